// Queries and keys normalized and turned, values copied: heads before rows. One simdgroup per head
// and row. If STAGED keys and values go where they belong: into buffers that are inputs, the tree's
// row r to place tree[1] + r.
// q_rows, k_rows, v_rows T [rows, *], where int32 [6]: the first column of queries, keys, values, the
// distance of two query heads in columns, heads, kv_heads; q_weight, k_weight T [DIM], q_eps, k_eps
// float [1], turn_cos, turn_sin float [rows, half]; if STAGED kept_keys, kept_values T [kv_heads,
// capacity, DIM], written into, tree int32 [rows, *]: the row's position, the committed length;
// order: not read
// -> queries T [heads, rows, DIM], keys, values T [kv_heads, rows, DIM], if STAGED left as they are
// grid (32, heads + 2 * kv_heads, rows), threadgroup (32, 1, 1)
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.z;
const uint rows = threadgroups_per_grid.z;
const uint unit = threadgroup_position_in_grid.y;
const uint heads = where[4], kv_heads = where[5];
const uint half_turned = turn_cos_shape[1];
if (unit < heads) {
  auto from = q_rows + ulong(row) * q_rows_shape[1] + where[0] + unit * where[3];
  auto to = queries + (unit * rows + row) * DIM;
  normalize_and_turn<T, DIM>(from, q_weight, q_eps[0], turn_cos, turn_sin, row * half_turned, half_turned, to, lane);
} else {
  const bool key = unit < heads + kv_heads;
  const uint head = unit - heads - (key ? 0 : kv_heads);
  auto to = (key ? keys : values) + (head * rows + row) * DIM;
  if (STAGED) {
    const ulong place = ulong(head) * kept_keys_shape[1] + uint(tree[1]) + row;
    to = WRITABLE(T, key ? kept_keys : kept_values) + place * DIM;
  }
  if (key) {
    auto from = k_rows + ulong(row) * k_rows_shape[1] + where[1] + head * DIM;
    normalize_and_turn<T, DIM>(from, k_weight, k_eps[0], turn_cos, turn_sin, row * half_turned, half_turned, to, lane);
  } else {
    auto from = v_rows + ulong(row) * v_rows_shape[1] + where[2] + head * DIM;
    for (uint i = lane; i < DIM; i += 32) to[i] = from[i];
  }
}
