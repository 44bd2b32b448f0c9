// Queries and keys normalized and turned, values copied: heads before rows. One simdgroup per head
// and row.
// q_rows, k_rows, v_rows T [rows, *], where int32 [6]: the first column of queries, keys, values, the
// distance of two query heads in columns, heads, kv_heads; q_weight, k_weight T [DIM], q_eps, k_eps
// float [1], turn_cos, turn_sin float [rows, half]
// -> queries T [heads, rows, DIM], keys, values T [kv_heads, rows, DIM]
// grid (32, heads + 2 * kv_heads, rows), threadgroup (32, 1, 1)
constexpr uint PER = DIM / 32;
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.z;
const uint rows = threadgroups_per_grid.z;
const uint head = threadgroup_position_in_grid.y;
const uint heads = where[4], kv_heads = where[5];
if (head >= heads + kv_heads) {
  const uint h = head - heads - kv_heads;
  auto from = v_rows + ulong(row) * v_rows_shape[1] + where[2] + h * DIM;
  auto to = values + (h * rows + row) * DIM;
  for (uint i = lane; i < DIM; i += 32) to[i] = from[i];
} else {
  const bool query = head < heads;
  const uint h = query ? head : head - heads;
  auto from = query ? q_rows + ulong(row) * q_rows_shape[1] + where[0] + h * where[3]
                    : k_rows + ulong(row) * k_rows_shape[1] + where[1] + h * DIM;
  auto weight = query ? q_weight : k_weight;
  auto to = query ? queries + (h * rows + row) * DIM : keys + (h * rows + row) * DIM;
  const uint half_turned = turn_cos_shape[1];

  // the other one of each pair is read again, not fetched from the lane that has it: pairs may be
  // any distance apart
  float own[PER], other[PER], squares = 0.0f;
  for (uint j = 0; j < PER; ++j) {
    const uint i = lane + 32 * j;
    const uint pair = i < half_turned ? i + half_turned : i < 2 * half_turned ? i - half_turned : i;
    own[j] = float(from[i]);
    other[j] = float(from[pair]) * float(weight[pair]);
    squares = metal::fma(own[j], own[j], squares);
  }
  const float mean = simd_sum(squares) / float(DIM);
  const float scale = metal::rsqrt(mean + (query ? q_eps[0] : k_eps[0]));
  for (uint j = 0; j < PER; ++j) {
    const uint i = lane + 32 * j;
    float result = own[j] * float(weight[i]) * scale;
    if (i < 2 * half_turned) {
      const uint angle = row * half_turned + (i < half_turned ? i : i - half_turned);
      const float turned = other[j] * scale * float(turn_sin[angle]);
      result = metal::fma(result, float(turn_cos[angle]), i < half_turned ? -turned : turned);
    }
    to[i] = T(result);
  }
}
