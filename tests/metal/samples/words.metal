// Every word of the vocabulary once, on one full simdgroup: what each gives is tested by value.
// x uint [32] -> out float [32 * 24]
uint lane = thread_index_in_simdgroup;
float own = float(x[lane]) + 1.0f;
SHARED(float, shared, 32);
shared[thread_index_in_threadgroup] = own;
threadgroup_barrier(mem_flags::mem_threadgroup);
uint at = 0;
out[32 * at++ + lane] = simd_sum(own);
out[32 * at++ + lane] = simd_max(own);
out[32 * at++ + lane] = simd_min(own);
out[32 * at++ + lane] = simd_shuffle(own, (lane + 5) % 32);
out[32 * at++ + lane] = simd_broadcast(own, 7);
out[32 * at++ + lane] = simd_broadcast_first(own);
out[32 * at++ + lane] = simd_shuffle_xor(own, 3);
out[32 * at++ + lane] = simd_shuffle_down(own, 4);
out[32 * at++ + lane] = simd_shuffle_up(own, 4);
out[32 * at++ + lane] = simd_prefix_inclusive_sum(own);
out[32 * at++ + lane] = simd_prefix_exclusive_sum(own);
out[32 * at++ + lane] = simd_all(own > 0.0f) ? 1.0f : 0.0f;
out[32 * at++ + lane] = simd_any(own > 32.0f) ? 1.0f : 0.0f;
simdgroup_barrier(mem_flags::mem_threadgroup);
out[32 * at++ + lane] = shared[31 - lane];
auto four = LOAD(uint4, x + 4 * (lane % 8));
out[32 * at++ + lane] = float(four.x + four.y + four.z + four.w);
float2 pair;
pair.x = own;
pair.y = -own;
if (lane < 16) {
  STORE(float2, out + 32 * at + 2 * lane, pair);
}
at++;
out[32 * at++ + lane] = as_type<float>(as_type<uint>(own));
out[32 * at++ + lane] = metal::exp(-own) + metal::exp2(-own) + metal::log(own) + metal::log2(own);
out[32 * at++ + lane] = metal::sqrt(own) + metal::rsqrt(own) + metal::tanh(own) + metal::pow(own, 2.0f);
out[32 * at++ + lane] = metal::sin(own) + metal::cos(own) + metal::fma(own, 2.0f, 1.0f);
out[32 * at++ + lane] = metal::floor(own / 3.0f) + metal::ceil(own / 3.0f) + metal::rint(own / 3.0f);
out[32 * at++ + lane] = metal::abs(-own) + metal::clamp(own, 3.0f, 9.0f) + metal::select(1.0f, 2.0f, own > 4.0f);
out[32 * at++ + lane] = metal::min(own, 7.0f) + metal::max(own, 7.0f) + float(metal::popcount(x[lane]));
bool finite = metal::isfinite(own) && !metal::isnan(own) && !metal::isfinite(INF);
ushort narrow = ushort(lane);
uchar narrower = uchar(narrow);
ulong wide = narrower;
out[32 * at++ + lane] = (finite ? 1.0f : 0.0f) + metal::fast::exp(-own) + metal::precise::exp(-own) + float(wide) + float(bfloat(1.0f))
    + float(threads_per_threadgroup.x + threads_per_simdgroup + threadgroups_per_grid.x + simdgroups_per_threadgroup)
    + float(thread_position_in_grid.x + thread_position_in_threadgroup.x + threadgroup_position_in_grid.x + simdgroup_index_in_threadgroup);
