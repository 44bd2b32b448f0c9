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
