// What attention reads and remembers of a draft's block: queries of the block's rows; keys and values
// of the rows told before it, and behind them those of the block. Queries and keys are normalized and
// turned. One simdgroup per head and row.
// q_rows, k_rows, v_rows, told_k, told_v T [block, *]; count int [1 or more]: told rows that count;
// where int [8]: the first columns of the five, then heads, kv_heads; q_weight, k_weight T [DIM],
// q_eps, k_eps float [1]; turn_cos, turn_sin float [2 * block or more, half], of the first told row's
// position and those that follow
// -> queries T [heads, block, DIM]; rows T [2, kv_heads, 2 * block, DIM], keys and values: told rows,
//    from place `count` on the block, then zeros
// grid (32, heads + 4 * kv_heads, block), threadgroup (32, 1, 1)
constexpr uint PER = DIM / 32;
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.z;
const uint block = threadgroups_per_grid.z;
const uint unit = threadgroup_position_in_grid.y;
const uint heads = where[5], kv_heads = where[6];
const uint real = uint(count[0]);
const bool query = unit < heads;
const uint kind = query ? 0 : (unit - heads) / kv_heads;  // keys, told keys, values, told values
const uint h = query ? unit : (unit - heads) % kv_heads;
const bool told = kind % 2 == 1, none = told && row >= real;
const uint angle = told ? row : real + row;
const uint place = none ? block + row : angle;
auto from = query ? q_rows + ulong(row) * q_rows_shape[1] + where[0]
    : kind == 0 ? k_rows + ulong(row) * k_rows_shape[1] + where[1]
    : kind == 1 ? told_k + ulong(row) * told_k_shape[1] + where[3]
    : kind == 2 ? v_rows + ulong(row) * v_rows_shape[1] + where[2]
                : told_v + ulong(row) * told_v_shape[1] + where[4];
from = from + h * DIM;
auto to = query ? queries + (h * block + row) * DIM
                : rows + ((kind / 2 * kv_heads + h) * 2 * block + place) * DIM;
if (none || kind >= 2) {
  for (uint i = lane; i < DIM; i += 32) to[i] = none ? T(0.0f) : from[i];
} else {
  auto weight = query ? q_weight : k_weight;
  const uint half_turned = turn_cos_shape[1];
  // the other one of each pair is read again: pairs may be any distance apart
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
      const uint at = angle * half_turned + (i < half_turned ? i : i - half_turned);
      const float turned = other[j] * scale * float(turn_sin[at]);
      result = metal::fma(result, float(turn_cos[at]), i < half_turned ? -turned : turned);
    }
    to[i] = T(result);
  }
}
