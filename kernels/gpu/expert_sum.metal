// out = x + the weighted sum of each row's experts' outputs, then the shared expert's. A threadgroup
// computes 8 features of all rows: its simdgroups take the entries of the union in turns and leave
// down h for each (row, rank) in its memory, where the rows add them up in the order of their ranks.
// x T [rows, features]; hidden, shared_hidden: of expert_hidden; down [slots, features, INNER];
// shared_down [features, SHARED_INNER]; used, experts, table: as there; factors float [rows, TOP_K];
// gate T [rows, n]: the shared expert counts sigmoid(gate[row, GATE]); apart float [rows, TOP_K, features]
// -> out O [rows, features]; if APART, float [rows, TOP_K, features]: the outputs as they are,
// 0 where the table says -1. Without ROUTED the routed experts' outputs are read from `apart`.
constexpr int EACH = TOP_K + 1;
SHARED(float, outputs, MOST * EACH * 8);
SHARED(float, amounts, MOST * EACH);  // what each counts
uint lane = thread_index_in_simdgroup;
int rows = x_shape[0];
int features = x_shape[1];
int feature = 8 * int(threadgroup_position_in_grid.x);
int first = int(thread_index_in_threadgroup);
int threads = 32 * int(simdgroups_per_threadgroup);
int entries = ROUTED ? used_shape[0] : 0;

if (!APART) {
  for (int i = first; i < rows * EACH; i += threads) {
    int row = i / EACH;
    int rank = i % EACH;
    if (rank < TOP_K) {
      amounts[i] = factors[row * TOP_K + rank];
    } else if (WITH_SHARED) {
      amounts[i] = 1.0f / (1.0f + metal::exp(-float(gate[row * gate_shape[1] + GATE])));
    }
  }
}
for (int entry = int(simdgroup_index_in_threadgroup) - (WITH_SHARED ? 1 : 0); entry < entries; entry += int(simdgroups_per_threadgroup)) {
  if (WITH_SHARED && entry < 0) {
    auto shared_downs = weights<T, SHARED_BITS, SHARED_GROUP>(shared_down, shared_down_scales, shared_down_biases, SHARED_INNER);
    for (uint left = 0xffffffffu >> (32 - rows); left != 0; left = without_lowest(left, ROWS)) {
      for (int at = 0; at < 8; at += ROWS == 1 ? 8 : 4) {
        expert_outputs<ROWS, (ROWS == 1 ? 8 : 4), 0, EACH>(shared_downs, feature, shared_hidden, left, 0, experts, outputs, at, lane);
      }
    }
  } else if (ROUTED) {
    int expert = used[2 * entry];
    int slot = expert < 0 ? -1 : table[expert];
    if (slot >= 0) {
      auto downs = weights<T, BITS, GROUP>(down, down_scales, down_biases, INNER).row(ulong(slot) * features);
      uint mask = uint(used[2 * entry + 1]);
      if (ROWS == 1 || metal::popcount(mask) == 1) {
        expert_outputs<1, 8, TOP_K, EACH>(downs, feature, hidden, mask, expert, experts, outputs, 0, lane);
      } else {
        for (uint left = mask; left != 0; left = without_lowest(left, ROWS)) {
          for (int at = 0; at < 8; at += 4) {
            expert_outputs<ROWS, 4, TOP_K, EACH>(downs, feature, hidden, left, expert, experts, outputs, at, lane);
          }
        }
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

if (APART) {
  for (int i = first; i < rows * TOP_K * 8; i += threads) {
    int pair = i / 8;
    int place = (pair / TOP_K * EACH + pair % TOP_K) * 8 + i % 8;
    out[pair * features + feature + i % 8] = O(table[experts[pair]] < 0 ? 0.0f : outputs[place]);
  }
} else {
  for (int i = first; i < rows * 8; i += threads) {
    int row = i / 8;
    int f = i % 8;
    float sum = 0.0f;
    for (int k = 0; k < TOP_K; ++k) {
      float output = ROUTED ? outputs[(row * EACH + k) * 8 + f] : float(apart[(row * TOP_K + k) * features + feature + f]);
      sum = metal::fma(amounts[row * EACH + k], output, sum);
    }
    if (WITH_SHARED) {
      sum = metal::fma(amounts[row * EACH + TOP_K], outputs[(row * EACH + TOP_K) * 8 + f], sum);
    }
    out[row * features + feature + f] = O(float(x[row * features + feature + f]) + sum);
  }
}
