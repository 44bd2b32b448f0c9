// of delta_tree.metal and delta_replay.metal

HELPER float delta_silu(float x) {
  return x / (1.0f + metal::exp(-x));
}

// log(1 + exp(x)); the logarithm loses the digits of what is small beside 1
HELPER float delta_softplus(float x) {
  float e = metal::exp(-metal::abs(x));
  float rest = e < 0.001f ? metal::fma(-0.5f * e, e, e) : metal::log(1.0f + e);
  return metal::max(x, 0.0f) + rest;
}

// ROWS rows of a head's state that a simdgroup holds, a key's columns lane, lane + 32, ...
template <int ROWS, int KEY_DIM, typename To, typename From>
HELPER void delta_load(To s, From state, uint lane) {
  constexpr int EACH = (KEY_DIM + 31) / 32;
#pragma unroll
  for (int i = 0; i < ROWS * EACH; ++i) {
    uint k = 32 * (i % EACH) + lane;
    s[i] = int(k) < KEY_DIM ? float(state[i / EACH * KEY_DIM + k]) : 0.0f;
  }
}

template <int ROWS, int KEY_DIM, typename To, typename From>
HELPER void delta_store(To state, From s, uint lane) {
  constexpr int EACH = (KEY_DIM + 31) / 32;
#pragma unroll
  for (int i = 0; i < ROWS * EACH; ++i) {
    uint k = 32 * (i % EACH) + lane;
    if (int(k) < KEY_DIM) {
      state[i / EACH * KEY_DIM + k] = s[i];
    }
  }
}

// 2 * HALF values become HALF: each lane keeps one half, those whose index has the bit DISTANCE the
// upper one, and adds what the lane at that distance had of it. A lone value is added up.
template <int HALF, int DISTANCE, typename Values>
HELPER void delta_fold(Values values, uint lane) {
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    float low = values[i];
    float high = values[i + HALF];
    bool upper = (lane & DISTANCE) != 0;
    values[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, DISTANCE);
  }
  if (HALF == 0) {
    values[0] = values[0] + simd_shuffle_xor(values[0], DISTANCE);
  }
}

// The sums of COUNT values over the lanes, COUNT a power of two up to 32: every lane returns one of
// them, delta_sum_of says which. The additions are those of simd_sum, the shuffles far fewer.
template <int COUNT, typename Values>
HELPER float delta_sums(Values values, uint lane) {
  delta_fold<COUNT / 2, 1>(values, lane);
  delta_fold<COUNT / 4, 2>(values, lane);
  delta_fold<COUNT / 8, 4>(values, lane);
  delta_fold<COUNT / 16, 8>(values, lane);
  delta_fold<COUNT / 32, 16>(values, lane);
  return values[0];
}

// Which value's sum a lane has; and as reversing bits is its own inverse, of a value below COUNT
// the first lane that has its sum.
template <int COUNT>
HELPER uint delta_sum_of(uint lane) {
  uint value = 0;
#pragma unroll
  for (int bit = 1; bit < COUNT; bit *= 2) {
    value = 2 * value + (lane & bit ? 1 : 0);
  }
  return value;
}
