// out = x + the weighted sum of each row's experts' outputs, then the shared expert's. A threadgroup
// computes 8 features of all rows: its simdgroups take the entries of the union in turns and leave
// down h for each (row, rank) in its memory, where the rows add them up in the order of their ranks.
// x T [rows, features]; hidden, shared_hidden: of expert_hidden; down [slots, features, INNER];
// shared_down [features, SHARED_INNER]; used, experts, table: as there; factors float [rows, TOP_K];
// gate T [rows, n]: the shared expert counts sigmoid(gate[row, GATE]); apart float [rows, TOP_K, features]
// -> out O [rows, features]; if APART, float [rows, TOP_K, features]: the outputs as they are,
// 0 where the table says -1. Without ROUTED the routed experts' outputs are read from `apart`.
constexpr int EACH = TOP_K + 1;           // outputs of a row: those of its experts, and the shared one's
constexpr int ALONE = ROWS == 1 ? 4 : 8;  // features at once of an expert that one row uses
constexpr int TOGETHER = 4;               // of others; as registers allow
SHARED(float, outputs, MOST * EACH * 8);
SHARED(float, amounts, MOST * EACH);  // what each counts
uint lane = thread_index_in_simdgroup;
int rows = x_shape[0];
int features = x_shape[1];
int feature = 8 * int(threadgroup_position_in_grid.x);
int first = int(thread_index_in_threadgroup);
int simdgroup = int(simdgroup_index_in_threadgroup);
int simdgroups = int(simdgroups_per_threadgroup);
int threads = 32 * simdgroups;

if (!APART) {
  set_amounts<TOP_K, WITH_SHARED>(factors, gate + GATE, WITH_SHARED ? gate_shape[1] : 0, rows, amounts, first, threads);
}

if (WITH_SHARED) {
  // the last simdgroups, which have fewer entries, take the rows ROWS by ROWS
  auto downs = weights<T, SHARED_BITS, SHARED_GROUP>(shared_down, shared_down_scales, shared_down_biases, SHARED_INNER).row(feature);
  for (int row = ROWS * (simdgroups - 1 - simdgroup); row < rows; row += ROWS * simdgroups) {
    int own = metal::min(row + int(lane), rows - 1);
#pragma unroll 1
    for (int at = 0; at < 8; at += TOGETHER) {
      expert_outputs<ROWS, TOGETHER, SHARED_INNER>(downs, features, shared_hidden, rows - row, own, own * EACH + TOP_K, outputs, at, lane);
    }
  }
}
#pragma unroll 1
for (int from = simdgroup; ROUTED && from < used_shape[0]; from += 32 * simdgroups) {
  // what is to be known of the simdgroup's next 32 entries, one in each lane
  int slots = -1;
  int masks = 0;
  int names = -1;
  int pairs = 0;
  int places = 0;
  int entry = from + simdgroups * int(lane);
  if (entry < used_shape[0]) {
    names = used[2 * entry];
    masks = used[2 * entry + 1];
    slots = names < 0 ? -1 : table[names];
  }
  if (slots >= 0) {
    int row = lowest_bit(uint(masks));
    int rank = rank_of<TOP_K>(experts + row * TOP_K, names);
    pairs = row * TOP_K + rank;
    places = row * EACH + rank;
  }
#pragma unroll 1
  for (int i = 0; i < 32 && from + simdgroups * i < used_shape[0]; ++i) {
    int slot = simd_shuffle(slots, uint(i));
    if (slot >= 0) {
      auto downs = weights<T, BITS, GROUP>(down, down_scales, down_biases, INNER).row(uint(slot * features + feature));
      uint mask = uint(simd_shuffle(masks, uint(i)));
      if (ROWS == 1 || metal::popcount(mask) == 1) {
        int pair = simd_shuffle(pairs, uint(i));
        int place = simd_shuffle(places, uint(i));
#pragma unroll 1
        for (int at = 0; at < 8; at += ALONE) {
          expert_outputs<1, ALONE, INNER>(downs, features, hidden, 1, pair, place, outputs, at, lane);
        }
      } else {
        int expert = simd_shuffle(names, uint(i));
#pragma unroll 1
        for (uint left = mask; left != 0; left = without_lowest(left, ROWS)) {
          int count = int(metal::popcount(left));
          int row = lowest_bit(int(lane) < count ? without_lowest(left, int(lane)) : left);
          int rank = rank_of<TOP_K>(experts + row * TOP_K, expert);
#pragma unroll 1
          for (int at = 0; at < 8; at += TOGETHER) {
            expert_outputs<ROWS, TOGETHER, INNER>(downs, features, hidden, count, row * TOP_K + rank, row * EACH + rank, outputs, at, lane);
          }
        }
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (APART) {
  keep_apart<O, TOP_K, EACH, 8>(outputs, experts, table, rows, features, feature, out, first, threads);
} else {
  add_outputs<O, TOP_K, EACH, 8, ROUTED, WITH_SHARED>(x, outputs, amounts, apart, rows, features, feature, out, first, threads);
}
