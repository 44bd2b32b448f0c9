// of delta_tree.metal and delta_replay.metal

// x / (1 + exp(-x)) without the branch that a division has for rare operands: a row has 16 of them a
// lane, which can only run beside each other where nothing branches.
HELPER float delta_silu(float x) {
  float root = metal::rsqrt(1.0f + metal::exp(-x));
  return x * root * root;
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

// ROWS rows of a state; a lane of LANES has four columns from 4 * lane, 4 * (lane + LANES), ... on
template <int ROWS, int KEY_DIM, int LANES, typename To, typename From>
HELPER void delta_load_fours(To s, From state, uint lane) {
  constexpr int FOURS = (KEY_DIM + 4 * LANES - 1) / (4 * LANES);
#pragma unroll
  for (int i = 0; i < ROWS * FOURS; ++i) {
    int k = 4 * (LANES * (i % FOURS) + int(lane));
    bool inside = k < KEY_DIM;
    auto four = LOAD(float4, state + i / FOURS * KEY_DIM + (inside ? k : 0));
    s[4 * i] = inside ? four.x : 0.0f;
    s[4 * i + 1] = inside ? four.y : 0.0f;
    s[4 * i + 2] = inside ? four.z : 0.0f;
    s[4 * i + 3] = inside ? four.w : 0.0f;
  }
}

template <int ROWS, int KEY_DIM, int LANES, typename To, typename From>
HELPER void delta_store_fours(To state, From s, uint lane) {
  constexpr int FOURS = (KEY_DIM + 4 * LANES - 1) / (4 * LANES);
#pragma unroll
  for (int i = 0; i < ROWS * FOURS; ++i) {
    int k = 4 * (LANES * (i % FOURS) + int(lane));
    float4 four;
    four.x = s[4 * i];
    four.y = s[4 * i + 1];
    four.z = s[4 * i + 2];
    four.w = s[4 * i + 3];
    if (k < KEY_DIM) {
      STORE(float4, state + i / FOURS * KEY_DIM + k, four);
    }
  }
}

// What the TAPS of a row see of COLUMNS channels side by side, and of as many `apart` behind them if
// PARTS is 2: a lane gets its columns lane, lane + 32, ... of the first part, then of the second, all
// taps of each. x [rows, stride] and before [TAPS - 1, channels] begin at the first channel; window: of
// the row. `seen` is of the type of x: to convert it would be to wait for it.
template <int COLUMNS, int PARTS, int TAPS, bool SINGLE, typename To, typename X, typename Before,
          typename Window>
HELPER void delta_look(To seen, X x, uint stride, Before before, uint channels, uint apart,
                       Window window, uint lane) {
  constexpr int BLOCKS = (COLUMNS + 31) / 32;
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) {
    int at = SINGLE ? tap : window[tap];
    auto place = at < TAPS - 1 ? before + at * channels : x + (at - (TAPS - 1)) * stride;
#pragma unroll
    for (int n = 0; n < PARTS * BLOCKS; ++n) {
      int k = 32 * (n % BLOCKS) + int(lane);
      seen[n * TAPS + tap] = (place + n / BLOCKS * apart)[k < COLUMNS ? k : 0];
    }
  }
}

// The convolution of what delta_look saw. kept: where, if `keeps`, a row's own channels are kept, or
// after the only row all that the next one will see.
template <int COLUMNS, int PARTS, int TAPS, bool SINGLE, typename R, typename To, typename Seen,
          typename Weights, typename Kept>
HELPER void delta_convolve(To mixed, Seen seen, Weights weights, uint channels, uint apart, Kept kept,
                           bool keeps, uint lane) {
  constexpr int BLOCKS = (COLUMNS + 31) / 32;
  float weight[PARTS * BLOCKS * TAPS];
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) {
#pragma unroll
    for (int n = 0; n < PARTS * BLOCKS; ++n) {
      int k = 32 * (n % BLOCKS) + int(lane);
      auto place = weights + tap * channels + n / BLOCKS * apart;
      weight[n * TAPS + tap] = float(place[k < COLUMNS ? k : 0]);
    }
  }
  simdgroup_barrier(mem_flags::mem_none);  // all loads before the first wait
#pragma unroll
  for (int n = 0; n < PARTS * BLOCKS; ++n) {
    float sum = 0.0f;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      sum = metal::fma(float(seen[n * TAPS + tap]), weight[n * TAPS + tap], sum);
    }
    bool inside = 32 * (n % BLOCKS) + int(lane) < COLUMNS;
    mixed[n] = inside ? delta_silu(sum) : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < PARTS * BLOCKS; ++n) {
    int k = 32 * (n % BLOCKS) + int(lane);
#pragma unroll
    for (int tap = SINGLE ? 1 : TAPS - 1; tap < TAPS; ++tap) {
      if (keeps && k < COLUMNS) {
        uint line = SINGLE ? (tap - 1) * channels : 0;
        (kept + line + n / BLOCKS * apart)[k] = R(float(seen[n * TAPS + tap]));
      }
    }
  }
}
