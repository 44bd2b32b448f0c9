// silu(gate h) * (up h), h = rms_norm(x), of each expert in use for the rows that use it, and of
// the shared expert for all. A simdgroup computes FEATURES features of one entry of the union:
// y counts the entries, the shared expert first. An expert is read once for all of its rows.
// x T [rows, HIDDEN], norm T [HIDDEN], eps float [1]; gate, up [slots, INNER, HIDDEN] as weights.h
// reads them; shared_gate, shared_up [SHARED_INNER, HIDDEN]; used int [entries, 2], experts int
// [rows, TOP_K], table int [all experts]: slot or -1 ->
// hidden float [rows * TOP_K, INNER], undefined where the table says -1;
// shared_hidden float [rows, SHARED_INNER]. Only one of them is written unless ROUTED and WITH_SHARED.
uint lane = thread_index_in_simdgroup;
int feature = FEATURES * int(threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup);
int entry = int(threadgroup_position_in_grid.y) - (WITH_SHARED ? 1 : 0);
if (WITH_SHARED && entry < 0) {
  if (feature < SHARED_INNER) {
    auto shared_gates = weights<T, SHARED_BITS, SHARED_GROUP>(shared_gate, shared_gate_scales, shared_gate_biases, HIDDEN);
    auto shared_ups = weights<T, SHARED_BITS, SHARED_GROUP>(shared_up, shared_up_scales, shared_up_biases, HIDDEN);
    for (uint left = 0xffffffffu >> (32 - x_shape[0]); left != 0; left = without_lowest(left, ROWS)) {
      expert_hidden<T, ROWS, FEATURES, 0>(shared_gates, shared_ups, SHARED_INNER, feature, x, norm, eps[0], left, 0, experts, shared_hidden, lane);
    }
  }
} else if (ROUTED && feature < INNER) {
  int expert = used[2 * entry];
  int slot = expert < 0 ? -1 : table[expert];
  if (slot >= 0) {
    auto gates = weights<T, BITS, GROUP>(gate, gate_scales, gate_biases, HIDDEN).row(ulong(slot) * INNER);
    auto ups = weights<T, BITS, GROUP>(up, up_scales, up_biases, HIDDEN).row(ulong(slot) * INNER);
    uint mask = uint(used[2 * entry + 1]);
    if (ROWS == 1 || metal::popcount(mask) == 1) {
      expert_hidden<T, 1, FEATURES, TOP_K>(gates, ups, INNER, feature, x, norm, eps[0], mask, expert, experts, hidden, lane);
    } else {
      for (uint left = mask; left != 0; left = without_lowest(left, ROWS)) {
        expert_hidden<T, ROWS, FEATURES, TOP_K>(gates, ups, INNER, feature, x, norm, eps[0], left, expert, experts, hidden, lane);
      }
    }
  }
}
