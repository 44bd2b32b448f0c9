// out = x + the weighted sum of each row's experts' outputs, then the shared expert's, on matrix
// units (tiles.h). A threadgroup computes 16 features of all rows: its simdgroups take the entries
// in turns and leave down h for each (row, rank) in its memory, where the rows add them up.
// Arrays as in expert_sum.metal, but T has 16 bits and hidden and shared_hidden are T. BITS 4, 8 or 0.
// INNER is UNROLL groups, or a multiple.
constexpr int EACH = ROUTED ? TOP_K + 1 : 1;  // outputs of a row, the shared one's last
SHARED(float, outputs, MOST * EACH * 16);
SHARED(float, amounts, MOST * (TOP_K + 1));  // what each counts
uint lane = thread_index_in_simdgroup;
int rows = x_shape[0];
int features = x_shape[1];
int feature = 16 * int(threadgroup_position_in_grid.x);
int self = int(thread_index_in_threadgroup);
int simdgroup = int(simdgroup_index_in_threadgroup);
int simdgroups = int(simdgroups_per_threadgroup);
int threads = 32 * simdgroups;

if (!APART) {
  set_amounts<TOP_K, WITH_SHARED>(factors, gate + GATE, WITH_SHARED ? gate_shape[1] : 0, rows, amounts, self, threads);
}
if (WITH_SHARED) {
  // the last simdgroups, which have fewer entries, take the rows 8 by 8
  auto down_weights = tile_weights(shared_down, shared_down_scales, shared_down_biases);
  for (int row = 8 * (simdgroups - 1 - simdgroup); row < rows; row += 8 * simdgroups) {
    int own = metal::min(row + int(lane), rows - 1);
    tile_outputs<T, SHARED_BITS, SHARED_GROUP, SHARED_UNROLL>(down_weights, feature, SHARED_INNER, shared_hidden, rows - row, own, own * EACH + EACH - 1, outputs, lane);
  }
}
#pragma unroll 1
for (int from = simdgroup; ROUTED && from < used_shape[0]; from += 32 * simdgroups) {
  // what is to be known of the simdgroup's next 32 entries, one in each lane
  int slots = -1;
  int masks = 0;
  int names = -1;
  int entry = from + simdgroups * int(lane);
  if (entry < used_shape[0]) {
    names = used[2 * entry];
    masks = used[2 * entry + 1];
    slots = names < 0 ? -1 : table[names];
  }
  auto down_weights = tile_weights(down, down_scales, down_biases);
#pragma unroll 1
  for (int i = 0; i < 32 && from + simdgroups * i < used_shape[0]; ++i) {
    int slot = simd_shuffle(slots, uint(i));
    int expert = simd_shuffle(names, uint(i));
    uint mask = uint(simd_shuffle(masks, uint(i)));
#pragma unroll 1
    for (uint left = slot < 0 ? 0u : mask; left != 0; left = without_lowest(left, 8)) {
      int row = row_number(left, int(lane));
      int rank = rank_of<TOP_K>(experts + row * TOP_K, expert);
      tile_outputs<T, BITS, GROUP, UNROLL>(down_weights, slot * features + feature, INNER, hidden, int(metal::popcount(left)), row * TOP_K + rank, row * EACH + rank, outputs, lane);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (APART) {
  keep_apart<O, TOP_K, EACH, 16>(outputs, experts, table, rows, features, feature, out, self, threads);
} else {
  add_outputs<O, TOP_K, EACH, 16, ROUTED, WITH_SHARED>(x, outputs, amounts, apart, rows, features, feature, out, self, threads);
}
