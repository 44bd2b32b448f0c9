// metal:: mathematics in float; half and bfloat arguments are widened and the result rounded.
#pragma once
#include "types.h"

namespace metal {

#define SHIM_MATH(name, value)                                 \
  inline float name(float x) { return value; }                 \
  template <typename B>                                        \
  Short<B> name(Short<B> x) { return Short<B>(name(float(x))); }

SHIM_MATH(exp, std::exp(x))
SHIM_MATH(exp2, std::exp2(x))
SHIM_MATH(log, std::log(x))
SHIM_MATH(log2, std::log2(x))
SHIM_MATH(log10, std::log10(x))
SHIM_MATH(sqrt, std::sqrt(x))
SHIM_MATH(rsqrt, 1.0f / std::sqrt(x))
SHIM_MATH(sin, std::sin(x))
SHIM_MATH(cos, std::cos(x))
SHIM_MATH(tan, std::tan(x))
SHIM_MATH(tanh, std::tanh(x))
SHIM_MATH(fabs, std::fabs(x))
SHIM_MATH(floor, std::floor(x))
SHIM_MATH(ceil, std::ceil(x))
SHIM_MATH(trunc, std::trunc(x))
SHIM_MATH(rint, std::nearbyint(x))
SHIM_MATH(round, std::round(x))
#undef SHIM_MATH

inline float pow(float x, float y) { return std::pow(x, y); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return std::fabs(x) == INFINITY; }
inline bool isfinite(float x) { return std::fabs(x) <= FLT_MAX; }

// as in Metal, of a number and NaN the number
template <typename T>
T min(T a, T b) { return b < a || a != a ? b : a; }
template <typename T>
T max(T a, T b) { return b > a || a != a ? b : a; }
template <typename T>
T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <typename T>
T abs(T x) { return x < T(0) ? T(-x) : x; }
template <typename T>
T select(T otherwise, T chosen, bool condition) { return condition ? chosen : otherwise; }
template <typename T>
T sign(T x) { return T((x > T(0)) - (x < T(0))); }
inline float fmin(float a, float b) { return min(a, b); }
inline float fmax(float a, float b) { return max(a, b); }
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }

template <typename T, int N>
T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (uint i = 1; i < N; ++i) sum = sum + a[i] * b[i];
  return sum;
}

using ::as_type;
using std::numeric_limits;

namespace fast { using namespace metal; }
namespace precise { using namespace metal; }

}  // namespace metal
