// What top_tokens found in the parts of each row, made one.
// parts int [rows, parts, 2 * WIDTH + 3] -> top int [rows, 2 * WIDTH + 3], or if VERDICT [rows, 2], as
// top_tokens writes them
// grid (threads, rows, 1), threadgroup (threads, 1, 1); VALUES * threads >= parts * WIDTH
SHARED(uint, best_keys, 32);
SHARED(int, best_ids, 32);
SHARED(int, best, 2 * WIDTH);
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = simdgroups_per_threadgroup;
const uint row = threadgroup_position_in_grid.y;
const uint count = parts_shape[1];
const uint stride = 2 * WIDTH + 3;
auto from = parts + row * count * stride;
auto to = top + row * (VERDICT ? 2 : stride);

uint keys[VALUES];
float values[VALUES];
int ids[VALUES];
#pragma unroll
for (int i = 0; i < VALUES; ++i) {
  uint at = 32 * simdgroups * i + 32 * simdgroup + lane;
  bool there = at < count * WIDTH;
  auto one = from + (there ? at / WIDTH * stride + at % WIDTH : 0);
  ids[i] = one[0];
  values[i] = as_type<float>(one[WIDTH]);
  keys[i] = there && ids[i] >= 0 ? order_key(values[i]) : 0u;
}
top_of<VALUES, WIDTH>(keys, values, ids, best_keys, best_ids, best, lane, simdgroup, simdgroups);
if (!VERDICT) {
  for (uint i = thread_index_in_threadgroup; i < 2 * WIDTH; i += 32 * simdgroups) {
    to[i] = best[i];
  }
}
if (simdgroup == 0) {
  float peak = -INF;
  int whole = 1;
  for (uint p = lane; p < count; p += 32) {
    float reached = as_type<float>(from[p * stride + 2 * WIDTH]);
    peak = reached > peak ? reached : peak;
    whole = whole * from[p * stride + 2 * WIDTH + 2];
  }
  peak = simd_max(peak);
  whole = simd_min(whole);
  float sum = 0.0f;
  for (uint p = lane; p < count; p += 32) {
    float reached = as_type<float>(from[p * stride + 2 * WIDTH]);
    float share = as_type<float>(from[p * stride + 2 * WIDTH + 1]);
    // a part without any weight adds nothing; a broken one breaks the sum
    sum = metal::fma(share, share == 0.0f ? 0.0f : metal::exp(reached - peak), sum);
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    if (VERDICT) {
      to[0] = best[0];
      to[1] = whole;
    } else {
      to[2 * WIDTH] = as_type<int>(peak);
      to[2 * WIDTH + 1] = as_type<int>(sum);
      to[2 * WIDTH + 2] = whole;
    }
  }
}
