// silu(gate h) * (up h), h = rms_norm(x), of each expert in use for the rows that use it, and of the
// shared expert for all, on matrix units (tiles.h). A threadgroup computes 16 * SIMDGROUPS / SPLIT
// features of one entry, the shared expert's of SHARED_SPLIT: y counts 8 rows of that each, then the
// entries of the union, of which each is read once for 8 of its rows.
// Arrays as in expert_hidden.metal, but x [rows, HIDDEN] as normed rows (normed.h), T has 16 bits, and
// hidden is T [rows * TOP_K, INNER], shared_hidden T [rows, SHARED_INNER]. BITS 4, 8 or 0. SPLIT shares
// of UNROLL groups, or a multiple.
SHARED(float, shares, SIMDGROUPS * 8 * 36);
int self = int(thread_index_in_threadgroup);
int block = int(threadgroup_position_in_grid.x);
int tiles = WITH_SHARED ? (normed_shape[0] + 7) / 8 : 0;
int entry = int(threadgroup_position_in_grid.y) - tiles;
if (WITH_SHARED && entry < 0) {
  int first = 16 * (SIMDGROUPS / SHARED_SPLIT) * block;
  if (first < SHARED_INNER) {
    auto both = tile_weights(shared_gate, shared_gate_scales, shared_gate_biases, shared_up, shared_up_scales, shared_up_biases);
    int row = 8 * (entry + tiles);
    uint mask = (0xffffffffu >> (32 - metal::min(normed_shape[0] - row, 8))) << row;
    tile_hidden<T, SHARED_BITS, SHARED_GROUP, SHARED_SPLIT, SIMDGROUPS, SHARED_UNROLL, 0>(both, 0, HIDDEN, SHARED_INNER, first, normed, mask, 0, experts, shared_hidden, shares, self);
  }
} else if (ROUTED) {
  int first = 16 * (SIMDGROUPS / SPLIT) * block;
  int expert = used[2 * entry];
  int slot = expert < 0 ? -1 : table[expert];
  if (slot >= 0 && first < INNER) {
    auto both = tile_weights(gate, gate_scales, gate_biases, up, up_scales, up_biases);
    tile_hidden<T, BITS, GROUP, SPLIT, SIMDGROUPS, UNROLL, TOP_K>(both, slot * INNER, HIDDEN, INNER, first, normed, uint(used[2 * entry + 1]), expert, experts, hidden, shares, self);
  }
}
