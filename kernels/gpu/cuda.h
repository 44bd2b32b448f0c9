// The words of Metal in CUDA, and those of metal.h. One definition per line (see vocabulary.py).
// Left out on purpose: threads_per_grid, which differs where a grid is rounded up.

#define HELPER __device__ __forceinline__
#define SHARED(type, name, size) __shared__ type name[size]
#define LOAD(type, pointer) (*reinterpret_cast<const type*>(pointer))
#define STORE(type, pointer, value) (*reinterpret_cast<type*>(pointer) = (value))
#define WRITABLE(type, pointer) (const_cast<type*>(pointer))
#define FLOATS(array) (reinterpret_cast<float*>(array))
#define INF __int_as_float(0x7f800000)

// types
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using bfloat = __nv_bfloat16;
template <typename To, typename From> HELPER To as_type(From from) { static_assert(sizeof(To) == sizeof(From)); To to; memcpy(&to, &from, sizeof(To)); return to; }

// where a thread is
#define thread_position_in_grid (make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z))
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define threads_per_threadgroup blockDim
#define threads_per_simdgroup 32u
#define thread_index_in_threadgroup (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup (thread_index_in_threadgroup % 32u)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup / 32u)
#define simdgroups_per_threadgroup ((blockDim.x * blockDim.y * blockDim.z + 31u) / 32u)

// meetings; sums add in the order of a butterfly, as Apple GPUs do
#define threadgroup_barrier(flags) __syncthreads()
#define simdgroup_barrier(flags) __syncwarp()
template <typename T> HELPER T simd_sum(T v) { for (int i = 1; i < 32; i *= 2) v = v + __shfl_xor_sync(0xffffffffu, v, i); return v; }
template <typename T> HELPER T simd_max(T v) { for (int i = 1; i < 32; i *= 2) { T o = __shfl_xor_sync(0xffffffffu, v, i); v = o > v || v != v ? o : v; } return v; }
template <typename T> HELPER T simd_min(T v) { for (int i = 1; i < 32; i *= 2) { T o = __shfl_xor_sync(0xffffffffu, v, i); v = o < v || v != v ? o : v; } return v; }
HELPER int simd_max(int v) { if constexpr (__CUDA_ARCH__ < 800) return simd_max<int>(v); asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(v) : "r"(v)); return v; }
HELPER uint simd_max(uint v) { if constexpr (__CUDA_ARCH__ < 800) return simd_max<uint>(v); asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(v) : "r"(v)); return v; }
HELPER int simd_min(int v) { if constexpr (__CUDA_ARCH__ < 800) return simd_min<int>(v); asm volatile("redux.sync.min.s32 %0, %1, 0xffffffff;" : "=r"(v) : "r"(v)); return v; }
template <typename T> HELPER T simd_shuffle(T v, uint lane) { return __shfl_sync(0xffffffffu, v, lane); }
template <typename T> HELPER T simd_broadcast(T v, uint lane) { return __shfl_sync(0xffffffffu, v, lane); }
template <typename T> HELPER T simd_broadcast_first(T v) { return __shfl_sync(0xffffffffu, v, 0); }
template <typename T> HELPER T simd_shuffle_xor(T v, uint mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
template <typename T> HELPER T simd_shuffle_down(T v, uint by) { return __shfl_down_sync(0xffffffffu, v, by); }
template <typename T> HELPER T simd_shuffle_up(T v, uint by) { return __shfl_up_sync(0xffffffffu, v, by); }
template <typename T> HELPER T simd_prefix_inclusive_sum(T v) { for (uint i = 1; i < 32; i *= 2) { T o = __shfl_up_sync(0xffffffffu, v, i); if (thread_index_in_simdgroup >= i) v = o + v; } return v; }
template <typename T> HELPER T simd_prefix_exclusive_sum(T v) { v = __shfl_up_sync(0xffffffffu, simd_prefix_inclusive_sum(v), 1); return thread_index_in_simdgroup == 0 ? T(0) : v; }
HELPER bool simd_all(bool v) { return __all_sync(0xffffffffu, v); }
HELPER bool simd_any(bool v) { return __any_sync(0xffffffffu, v); }

// mathematics
namespace metal { HELPER float exp(float x) { return ::expf(x); } }
namespace metal { HELPER float exp2(float x) { return ::exp2f(x); } }
namespace metal { HELPER float log(float x) { return ::logf(x); } }
namespace metal { HELPER float log2(float x) { return ::log2f(x); } }
namespace metal { HELPER float sqrt(float x) { return ::sqrtf(x); } }
namespace metal { HELPER float rsqrt(float x) { return ::rsqrtf(x); } }
namespace metal { HELPER float sin(float x) { return ::sinf(x); } }
namespace metal { HELPER float cos(float x) { return ::cosf(x); } }
namespace metal { HELPER float tanh(float x) { return ::tanhf(x); } }
namespace metal { HELPER float pow(float x, float y) { return ::powf(x, y); } }
namespace metal { HELPER float floor(float x) { return ::floorf(x); } }
namespace metal { HELPER float ceil(float x) { return ::ceilf(x); } }
namespace metal { HELPER float rint(float x) { return ::rintf(x); } }
namespace metal { HELPER float fma(float a, float b, float c) { return ::fmaf(a, b, c); } }
namespace metal { HELPER bool isnan(float x) { return x != x; } }
namespace metal { HELPER bool isfinite(float x) { return ::fabsf(x) < INF; } }
namespace metal { template <typename T> HELPER T abs(T x) { return x < T(0) ? T(-x) : x; } }
namespace metal { template <typename T> HELPER T min(T a, T b) { return b < a || a != a ? b : a; } }
namespace metal { template <typename T> HELPER T max(T a, T b) { return b > a || a != a ? b : a; } }
namespace metal { template <typename T> HELPER T clamp(T x, T low, T high) { return min(max(x, low), high); } }
namespace metal { template <typename T> HELPER T select(T otherwise, T chosen, bool condition) { return condition ? chosen : otherwise; } }
namespace metal { HELPER uint popcount(uint x) { return ::__popc(x); } }
namespace metal::fast { HELPER float exp(float x) { return ::__expf(x); } }
namespace metal::precise { HELPER float exp(float x) { return ::expf(x); } }

// matrix units: 16 x 16 weights with 16 x 8 values of x, in pairs of 16 bits
HELPER int tile_row(uint lane) { return int(lane / 4u); }
HELPER int tile_quarter(uint lane) { return int(lane % 4u); }
HELPER uint tile_input(uint pair, uint lane) { return pair; }
HELPER uint lower_halves(uint a, uint b) { return __byte_perm(a, b, 0x5410); }
HELPER uint upper_halves(uint a, uint b) { return __byte_perm(a, b, 0x7632); }
HELPER uint pair_product_of(__nv_bfloat162 a, __nv_bfloat162 b) { return as_type<uint>(__hmul2(a, b)); }
template <typename T> HELPER uint pair_product(uint a, uint b) { static_assert(sizeof(T) == 2); return pair_product_of(as_type<__nv_bfloat162>(a), as_type<__nv_bfloat162>(b)); }
template <typename T, typename P> HELPER void tile_multiply(P sums, uint a, uint b, uint c, uint d, uint x, uint y) { asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a), "r"(b), "r"(c), "r"(d), "r"(x), "r"(y)); }
