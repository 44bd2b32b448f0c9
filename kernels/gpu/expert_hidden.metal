// silu(gate h) * (up h), h = rms_norm(x), of each expert in use for the rows that use it, and of
// the shared expert for all. A simdgroup computes FEATURES features of one entry: y counts ROWS rows
// of the shared expert each, then the entries of the union. Of these an expert is read from memory
// once for all of its rows, which take its weights ROWS by ROWS.
// x T [rows, HIDDEN], norm T [HIDDEN], eps float [1]; gate, up [slots, INNER, HIDDEN] as weights.h
// reads them; shared_gate, shared_up [SHARED_INNER, HIDDEN]; used int [entries, 2], experts int
// [rows, TOP_K], table int [all experts]: slot or -1 ->
// hidden float [rows * TOP_K, INNER], undefined where the table says -1, if ROUTED;
// shared_hidden float [rows, SHARED_INNER], if WITH_SHARED.
constexpr int ALONE = FEATURES;  // features at once of an expert that one row uses
constexpr int TOGETHER = 2;      // of others; as registers allow
uint lane = thread_index_in_simdgroup;
int feature = FEATURES * int(threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup);
int tiles = WITH_SHARED ? (x_shape[0] + ROWS - 1) / ROWS : 0;
int entry = int(threadgroup_position_in_grid.y) - tiles;
int in = x_shape[1];
if (WITH_SHARED && entry < 0) {
  if (feature < SHARED_INNER) {
    auto gates = weights<T, SHARED_BITS, SHARED_GROUP>(shared_gate, shared_gate_scales, shared_gate_biases, HIDDEN);
    auto ups = weights<T, SHARED_BITS, SHARED_GROUP>(shared_up, shared_up_scales, shared_up_biases, HIDDEN);
    uint mask = without_lowest(0xffffffffu >> (32 - x_shape[0]), ROWS * (entry + tiles));
#pragma unroll 1
    for (int at = 0; at < FEATURES; at += TOGETHER) {
      expert_hidden<T, ROWS, TOGETHER, HIDDEN, 0>(gates, ups, in, SHARED_INNER, feature + at, x, norm, eps[0], mask, 0, experts, shared_hidden, lane);
    }
  }
} else if (ROUTED && feature < INNER) {
  int expert = used[2 * entry];
  int slot = expert < 0 ? -1 : table[expert];
  if (slot >= 0) {
    auto gates = weights<T, BITS, GROUP>(gate, gate_scales, gate_biases, HIDDEN).row(uint(slot * INNER));
    auto ups = weights<T, BITS, GROUP>(up, up_scales, up_biases, HIDDEN).row(uint(slot * INNER));
    uint mask = uint(used[2 * entry + 1]);
    if (ROWS == 1 || metal::popcount(mask) == 1) {
#pragma unroll 1
      for (int at = 0; at < FEATURES; at += ALONE) {
        expert_hidden<T, 1, ALONE, HIDDEN, TOP_K>(gates, ups, in, INNER, feature + at, x, norm, eps[0], mask, expert, experts, hidden, lane);
      }
    } else {
#pragma unroll 1
      for (uint left = mask; left != 0; left = without_lowest(left, ROWS)) {
#pragma unroll 1
        for (int at = 0; at < FEATURES; at += TOGETHER) {
          expert_hidden<T, ROWS, TOGETHER, HIDDEN, TOP_K>(gates, ups, in, INNER, feature + at, x, norm, eps[0], left, expert, experts, hidden, lane);
        }
      }
    }
  }
}
