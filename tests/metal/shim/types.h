// The types of Metal that the kernels use: half and bfloat that round after every operation,
// vectors of 2 to 4, as_type. float stays float: the build makes unsuffixed literals float too.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

struct HalfBits {
  static uint16_t narrow(float value) {
    _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  static float widen(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
};

struct BfloatBits {
  static uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0 | static_cast<uint16_t>(bits >> 16);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
  }
  static float widen(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

// Narrowing is always written out, as bfloat wants it; widening to float is implicit.
template <typename Bits>
struct Short {
  uint16_t bits;
  Short() = default;
  template <typename N, typename = std::enable_if_t<std::is_arithmetic_v<N>>>
  explicit Short(N value) : bits(Bits::narrow(static_cast<float>(value))) {}
  template <typename Other>
  explicit Short(Short<Other> value) : bits(Bits::narrow(static_cast<float>(value))) {}
  operator float() const { return Bits::widen(bits); }
  template <typename N>
  Short& operator+=(N value) { return *this = Short(float(*this) + float(value)); }
  template <typename N>
  Short& operator-=(N value) { return *this = Short(float(*this) - float(value)); }
  template <typename N>
  Short& operator*=(N value) { return *this = Short(float(*this) * float(value)); }
  template <typename N>
  Short& operator/=(N value) { return *this = Short(float(*this) / float(value)); }
  Short operator-() const { return Short(-float(*this)); }
};
// float32 holds twice the digits and two more, so rounding its result once rounds correctly
template <typename B>
Short<B> operator+(Short<B> a, Short<B> b) { return Short<B>(float(a) + float(b)); }
template <typename B>
Short<B> operator-(Short<B> a, Short<B> b) { return Short<B>(float(a) - float(b)); }
template <typename B>
Short<B> operator*(Short<B> a, Short<B> b) { return Short<B>(float(a) * float(b)); }
template <typename B>
Short<B> operator/(Short<B> a, Short<B> b) { return Short<B>(float(a) / float(b)); }

using half = Short<HalfBits>;
using bfloat = Short<BfloatBits>;
using float16_t = half;
using bfloat16_t = bfloat;

template <typename T, int N>
struct vec;
template <typename T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  explicit vec(T a) : x(a), y(a) {}
  vec(T a, T b) : x(a), y(b) {}
  template <typename U>
  explicit vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
  T& operator[](uint i) { return (&x)[i]; }
  T operator[](uint i) const { return (&x)[i]; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  explicit vec(T a) : x(a), y(a), z(a) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <typename U>
  explicit vec(vec<U, 3> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
  T& operator[](uint i) { return (&x)[i]; }
  T operator[](uint i) const { return (&x)[i]; }
};
template <typename T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  explicit vec(T a) : x(a), y(a), z(a), w(a) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <typename U>
  explicit vec(vec<U, 4> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  T& operator[](uint i) { return (&x)[i]; }
  T operator[](uint i) const { return (&x)[i]; }
};
#define SHIM_VECTOR_OPERATOR(op)                                        \
  template <typename T, int N>                                          \
  vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                     \
    for (uint i = 0; i < N; ++i) a[i] = T(a[i] op b[i]);                \
    return a;                                                           \
  }                                                                     \
  template <typename T, int N>                                          \
  vec<T, N> operator op(vec<T, N> a, T b) { return a op vec<T, N>(b); } \
  template <typename T, int N>                                          \
  vec<T, N> operator op(T a, vec<T, N> b) { return vec<T, N>(a) op b; } \
  template <typename T, int N, typename B>                              \
  vec<T, N>& operator op##=(vec<T, N>& a, B b) { return a = a op b; }
SHIM_VECTOR_OPERATOR(+)
SHIM_VECTOR_OPERATOR(-)
SHIM_VECTOR_OPERATOR(*)
SHIM_VECTOR_OPERATOR(/)
SHIM_VECTOR_OPERATOR(&)
SHIM_VECTOR_OPERATOR(|)
SHIM_VECTOR_OPERATOR(^)

#define SHIM_VECTOR_NAMES(type)  \
  using type##2 = vec<type, 2>; \
  using type##3 = vec<type, 3>; \
  using type##4 = vec<type, 4>;
SHIM_VECTOR_NAMES(char)
SHIM_VECTOR_NAMES(uchar)
SHIM_VECTOR_NAMES(short)
SHIM_VECTOR_NAMES(ushort)
SHIM_VECTOR_NAMES(int)
SHIM_VECTOR_NAMES(uint)
SHIM_VECTOR_NAMES(long)
SHIM_VECTOR_NAMES(ulong)
SHIM_VECTOR_NAMES(half)
SHIM_VECTOR_NAMES(bfloat)
SHIM_VECTOR_NAMES(float)

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
