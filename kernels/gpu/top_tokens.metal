// The WIDTH largest logits of parts of rows, the sum of the exponentials, and whether all are finite.
// A threadgroup takes VALUES * its threads neighbouring ids of one row.
// logits T [rows, vocab] -> top int [rows, parts, 2 * WIDTH + 3]: ids by falling logit, among equals
// by rising id, -1 for none; the bits of their logits; the bits of the largest logit and of the sum
// of exp(logit - largest); 1 where all logits of the part are finite, else 0. If VERDICT [rows, 2]:
// the best id and whether all are finite, of rows in one part.
// grid (threads * parts, rows, 1), threadgroup (threads, 1, 1)
SHARED(int, best, 2 * WIDTH);
SHARED(uint, best_keys, 32);
SHARED(int, best_ids, 32);
SHARED(float, peaks, 32);
SHARED(float, sums, 32);
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = simdgroups_per_threadgroup;
const uint threads = 32 * simdgroups;
const uint part = threadgroup_position_in_grid.x;
const uint row = threadgroup_position_in_grid.y;
const uint vocab = logits_shape[1];
auto from = logits + ulong(row) * vocab;
auto to = top + (row * threadgroups_per_grid.x + part) * (VERDICT ? 2 : 2 * WIDTH + 3);

uint keys[VALUES];
float values[VALUES];
int ids[VALUES];
float peak = -INF;
bool broken = false;
#pragma unroll
for (int i = 0; i < VALUES; ++i) {
  uint id = part * VALUES * threads + threads * i + 32 * simdgroup + lane;
  bool there = id < vocab;
  values[i] = there ? float(from[there ? id : 0]) : -INF;
  ids[i] = int(id);
  keys[i] = there ? order_key(values[i]) : 0u;
  peak = values[i] > peak ? values[i] : peak;
  broken = broken || (there && (as_type<uint>(values[i]) & 0x7f800000u) == 0x7f800000u);
}
peak = simd_max(peak);
int bad = simd_max(broken ? 1 : 0);
if (lane == 0) {
  peaks[simdgroup] = peak;
  best_ids[simdgroup] = bad;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
peak = simd_max(lane < simdgroups ? peaks[lane] : -INF);
bad = simd_max(lane < simdgroups ? best_ids[lane] : 0);
// a part of nothing but -Inf has no weight in its row
const float most = peak == -INF ? 0.0f : peak;
float sum = 0.0f;
#pragma unroll
for (int i = 0; i < VALUES; ++i) {
  sum = sum + (keys[i] != 0 ? metal::exp(values[i] - most) : 0.0f);
}
sum = simd_sum(sum);
if (lane == 0) {
  sums[simdgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
sum = simd_sum(lane < simdgroups ? sums[lane] : 0.0f);
top_of<VALUES, WIDTH>(keys, values, ids, best_keys, best_ids, best, lane, simdgroup, simdgroups);
if (VERDICT) {
  if (lane == 0 && simdgroup == 0) {
    to[0] = best[0];
    to[1] = bad == 0 ? 1 : 0;
  }
} else {
  for (uint i = thread_index_in_threadgroup; i < 2 * WIDTH; i += threads) {
    to[i] = best[i];
  }
  if (lane == 0 && simdgroup == 0) {
    to[2 * WIDTH] = as_type<int>(peak);
    to[2 * WIDTH + 1] = as_type<int>(sum);
    to[2 * WIDTH + 2] = bad == 0 ? 1 : 0;
  }
}
