// What attention reads and remembers of a draft's block: queries of the block's rows; keys and values
// of the rows told before it, and behind them those of the block. Queries and keys are normalized and
// turned. One simdgroup per head and row. If STAGED the rows go where they belong: into a buffer that
// is an input, from place[0] on.
// q_rows, k_rows, v_rows, told_k, told_v T [block, *]; count int [1 or more]: told rows that count;
// where int [8]: the first columns of the five, then heads, kv_heads; q_weight, k_weight T [DIM],
// q_eps, k_eps float [1]; turn_cos, turn_sin float [2 * block or more, half], of the first told row's
// position and those that follow; if STAGED kept T [2, kv_heads, capacity, DIM], written into, place
// int [1 or more]; order: not read
// -> queries T [heads, block, DIM]; rows T [2, kv_heads, 2 * block, DIM], keys and values: told rows,
//    from place `count` on the block, then zeros; if STAGED left as they are
// grid (32, heads + 4 * kv_heads, block), threadgroup (32, 1, 1)
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.z;
const uint block = threadgroups_per_grid.z;
const uint unit = threadgroup_position_in_grid.y;
const uint heads = where[5], kv_heads = where[6];
const uint half_turned = turn_cos_shape[1];
const uint real = uint(count[0]);
if (unit < heads) {
  auto from = q_rows + ulong(row) * q_rows_shape[1] + where[0] + unit * DIM;
  auto to = queries + (unit * block + row) * DIM;
  normalize_and_turn<T, DIM>(from, q_weight, q_eps[0], turn_cos, turn_sin, (real + row) * half_turned, half_turned, to, lane);
} else {
  const uint kind = (unit - heads) / kv_heads;  // keys, told keys, values, told values
  const uint head = (unit - heads) % kv_heads;
  const bool told = kind % 2 == 1, none = told && row >= real;
  const uint angle = told ? row : real + row;
  const uint at = none ? block + row : angle;
  const uint half = kind / 2 * kv_heads + head;  // of keys, then of values
  auto from = kind == 0 ? k_rows + ulong(row) * k_rows_shape[1] + where[1]
      : kind == 1 ? told_k + ulong(row) * told_k_shape[1] + where[3]
      : kind == 2 ? v_rows + ulong(row) * v_rows_shape[1] + where[2]
                  : told_v + ulong(row) * told_v_shape[1] + where[4];
  from = from + head * DIM;
  auto to = rows + (half * 2 * block + at) * DIM;
  if (STAGED) {
    to = WRITABLE(T, kept) + (ulong(half) * kept_shape[2] + uint(place[0]) + at) * DIM;
  }
  if (none || kind >= 2) {
    for (uint i = lane; i < DIM; i += 32) to[i] = none ? T(0.0f) : from[i];
  } else {
    normalize_and_turn<T, DIM>(from, k_weight, k_eps[0], turn_cos, turn_sin, angle * half_turned, half_turned, to, lane);
  }
}
