// simd_* and the barriers: meetings of the threads of a simdgroup or of a threadgroup.
// Reductions add in the order of a butterfly (lane distances 1, 2, 4, 8, 16).
#pragma once
#include "group.h"

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
inline mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  uint phase;
  {
    shim::Unwatched here;
    phase = shim::group.running->barrier_phase++ & 1;
  }
  shim::release(&shim::group.phases[phase]);
  shim::wait(shim::State::at_barrier, "threadgroup_barrier", line);
  shim::acquire(&shim::group.phases[phase]);
}

inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  shim::Slot* slots;
  {
    shim::Unwatched here;
    shim::Thread& self = *shim::group.running;
    slots = shim::group.simdgroups[self.place.index / shim::lanes].slots[self.simd_phase++ & 1];
  }
  shim::release(slots);
  shim::wait(shim::State::at_simd, "simdgroup_barrier", line);
  shim::acquire(slots);
}

}  // namespace metal

namespace shim {

template <typename T>
struct Lanes {
  T value[lanes];
  uint count;  // lanes of this simdgroup: fewer than 32 only at the end of a group
  uint own;
};

// What every lane of the simdgroup brought. Orders no memory: a shuffle is not a barrier.
template <typename T>
Lanes<T> meet(T value, const char* operation, int line) {
  static_assert(sizeof(T) <= sizeof(Slot), "simd operations take up to 16 bytes");
  Unwatched here;
  Thread* self = group.running;
  uint first = self->place.index / lanes * lanes;
  Slot* slots = group.simdgroups[first / lanes].slots[self->simd_phase++ & 1];
  std::memcpy(slots[self->place.index - first].bytes, &value, sizeof(T));
  wait(State::at_simd, operation, line);
  Lanes<T> all;
  all.own = self->place.index - first;
  all.count = group.count - first < lanes ? group.count - first : lanes;
  for (uint i = 0; i < all.count; ++i) std::memcpy(&all.value[i], slots[i].bytes, sizeof(T));
  return all;
}

template <typename T, typename Combine>
T butterfly(Lanes<T> all, Combine combine) {
  for (uint distance = 1; distance < lanes; distance *= 2)
    for (uint i = 0; i + distance < all.count; i += 2 * distance)
      all.value[i] = combine(all.value[i], all.value[i + distance]);
  return all.value[0];
}

template <typename T, typename Combine>
Lanes<T> prefixes(Lanes<T> all, Combine combine) {
  for (uint distance = 1; distance < lanes; distance *= 2)
    for (uint i = all.count; i-- > distance;)
      all.value[i] = combine(all.value[i], all.value[i - distance]);
  return all;
}

}  // namespace shim

namespace metal {

#define SHIM_REDUCE(name, expression)                                        \
  template <typename T>                                                      \
  T name(T value, int line = __builtin_LINE()) {                             \
    return shim::butterfly(shim::meet(value, #name, line),                   \
                           [](T a, T b) { return static_cast<T>(expression); }); \
  }
SHIM_REDUCE(simd_sum, a + b)
SHIM_REDUCE(simd_product, a * b)
SHIM_REDUCE(simd_max, b > a || a != a ? b : a)
SHIM_REDUCE(simd_min, b < a || a != a ? b : a)
SHIM_REDUCE(simd_and, a & b)
SHIM_REDUCE(simd_or, a | b)
SHIM_REDUCE(simd_xor, a ^ b)
#undef SHIM_REDUCE

inline bool simd_all(bool value, int line = __builtin_LINE()) {
  return shim::butterfly(shim::meet(value, "simd_all", line), [](bool a, bool b) { return a && b; });
}
inline bool simd_any(bool value, int line = __builtin_LINE()) {
  return shim::butterfly(shim::meet(value, "simd_any", line), [](bool a, bool b) { return a || b; });
}
inline bool simd_is_first(int line = __builtin_LINE()) {
  return shim::meet(0, "simd_is_first", line).own == 0;
}

// Of a lane that does not exist comes poison.
#define SHIM_SHUFFLE(name, from)                              \
  template <typename T>                                       \
  T name(T value, ushort by, int line = __builtin_LINE()) {   \
    shim::Lanes<T> all = shim::meet(value, #name, line);      \
    uint lane = from;                                         \
    if (lane < all.count) return all.value[lane];             \
    T poison;                                                 \
    std::memset(static_cast<void*>(&poison), 0xff, sizeof(T)); \
    return poison;                                            \
  }
SHIM_SHUFFLE(simd_shuffle, by)
SHIM_SHUFFLE(simd_broadcast, by)
SHIM_SHUFFLE(simd_shuffle_xor, all.own ^ by)
SHIM_SHUFFLE(simd_shuffle_down, all.own + by < shim::lanes ? all.own + by : all.own)
SHIM_SHUFFLE(simd_shuffle_up, all.own >= by ? all.own - by : all.own)
SHIM_SHUFFLE(simd_shuffle_rotate_down, (all.own + by) % shim::lanes)
SHIM_SHUFFLE(simd_shuffle_rotate_up, (all.own + shim::lanes - by) % shim::lanes)
#undef SHIM_SHUFFLE

template <typename T>
T simd_broadcast_first(T value, int line = __builtin_LINE()) {
  return shim::meet(value, "simd_broadcast_first", line).value[0];
}

#define SHIM_PREFIX(name, op, identity)                                              \
  template <typename T>                                                              \
  T simd_prefix_inclusive_##name(T value, int line = __builtin_LINE()) {             \
    auto all = shim::prefixes(shim::meet(value, "simd_prefix_inclusive_" #name, line), \
                              [](T a, T b) { return static_cast<T>(a op b); });      \
    return all.value[all.own];                                                       \
  }                                                                                  \
  template <typename T>                                                              \
  T simd_prefix_exclusive_##name(T value, int line = __builtin_LINE()) {             \
    auto all = shim::prefixes(shim::meet(value, "simd_prefix_exclusive_" #name, line), \
                              [](T a, T b) { return static_cast<T>(a op b); });      \
    return all.own == 0 ? T(identity) : all.value[all.own - 1];                      \
  }
SHIM_PREFIX(sum, +, 0)
SHIM_PREFIX(product, *, 1)
#undef SHIM_PREFIX

// 8 x 8 values of a simdgroup. A lane has two that stand side by side, where Apple's GPUs of today
// have them: MLX's own kernels rely on the same places.
template <typename T, int Columns, int Rows>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup_matrix has 8 x 8 values");
  vec<T, 2> own;
  vec<T, 2>& thread_elements() { return own; }
};

// d = a b + c; products are added in the order of the columns of a
template <typename D, typename A, typename B, typename C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                   int line = __builtin_LINE()) {
  struct Factors {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  auto all = shim::meet(Factors{a.own, b.own}, "simdgroup_multiply_accumulate", line);
  auto lane_of = [](uint row, uint column) {
    return (row & 4) * 4 + (row & 3) * 2 + (column & 4) * 2 + (column & 2) / 2;
  };
  uint row = (all.own & 16) / 4 + (all.own & 6) / 2;
  uint column = (all.own & 8) / 2 + (all.own & 1) * 2;
  for (uint i = 0; i < 2; ++i) {
    float sum = static_cast<float>(c.own[i]);
    for (uint k = 0; k < 8; ++k)
      sum = std::fma(static_cast<float>(all.value[lane_of(row, k)].a[k % 2]),
                static_cast<float>(all.value[lane_of(k, column)].b[i]), sum);
    d.own[i] = static_cast<D>(sum);
  }
}

}  // namespace metal
