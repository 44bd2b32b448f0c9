// The blocks of attention_blocks added in order, divided by the sum of the weights, and gated.
// parts float [heads, rows, blocks, DIM] (its order of dimensions is that kernel's),
// totals float [heads, rows, blocks, 2], tree int32 [rows, *]: the row's position first;
// gate T [rows, *], a head's gate being DIM columns from start[0] + 2 * DIM * head + DIM on
// If WINDOW only the blocks from that of position tree[2] on count.
// -> out T [rows, heads * DIM]
// grid (heads * DIM, rows, 1), threadgroup (DIM, 1, 1)
constexpr uint PER = DIM / 32;
const uint lane = thread_index_in_simdgroup;
const uint me = thread_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.x;
const uint row = threadgroup_position_in_grid.y;
const uint used = uint(tree[row * tree_shape[1]]) / 128 + 1;
const uint begin = WINDOW ? uint(tree[row * tree_shape[1] + 2]) / 128 : 0;
const uint first = (head * parts_shape[1] + row) * parts_shape[2];
float peak = -INF;
for (uint b = begin + lane; b < used; b += 32) peak = metal::max(peak, totals[2 * (first + b)]);
peak = simd_max(peak);
float value = 0.0f, total = 0.0f;
// Loads by the batch, as in attention_blocks; behind the last block it is read again, and weighs
// nothing.
for (uint b = begin; b < used; b += 16) {
  float part[16], reached[16], sum[16];
#pragma unroll
  for (uint i = 0; i < 16; ++i) {
    const uint at = first + metal::min(b + i, used - 1);
    part[i] = parts[at * DIM + me];
    reached[i] = totals[2 * at];
    sum[i] = totals[2 * at + 1];
  }
  simdgroup_barrier(mem_flags::mem_none);
#pragma unroll
  for (uint i = 0; i < 16; ++i) {
    const float weight = b + i < used ? metal::exp(reached[i] - peak) : 0.0f;
    value = metal::fma(weight, part[i], value);
    total = metal::fma(weight, sum[i], total);
  }
}
value = value / total;
const uint dim = me % 32 * PER + me / 32;
if (GATED) {
  const float open = float(gate[ulong(row) * gate_shape[1] + start[0] + DIM * (2 * head + 1) + dim]);
  value = value / (1.0f + metal::exp(-open));
}
out[(row * parts_shape[0] + head) * DIM + dim] = T(value);
