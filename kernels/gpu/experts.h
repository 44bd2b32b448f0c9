// What an expert computes for up to ROWS rows at once, by one simdgroup. After weights.h,
// simd_sums.h, bits.h and entries.h.

// What OUTS chunks of weights, of the values from `first` on, add to the sums of row_dots.
template <typename T, int OUTS, int ROWS, int IN, bool NORM, typename C, typename X, typename I, typename N, typename P>
HELPER void add_chunks(C chunks, int first, X x, I inputs, N norm, P sums, P squares) {
#pragma unroll
  for (int e = 0; e < chunks[0].values / 8; ++e) {
    int at = first + 8 * e;
    float scale[8];
    if (NORM) {
      auto eight = LOAD(Eight<T>, norm + at);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        scale[k] = eight.get(k);
      }
    }
    float values[ROWS * 8];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      auto eight = LOAD(Eight<T>, x + inputs[r] * IN + at);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        float value = eight.get(k);
        if (NORM) {
          squares[r] = metal::fma(value, value, squares[r]);
          value = value * scale[k];
        }
        values[r * 8 + k] = value;
      }
    }
#pragma unroll
    for (int o = 0; o < OUTS; ++o) {
      float w[8];
      chunks[o].decode(e, w);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          sums[r * OUTS + o] = metal::fma(values[r * 8 + k], w[k], sums[r * OUTS + o]);
        }
      }
    }
  }
}

// Each lane's shares of the dot products of OUTS rows of weights with ROWS rows of x [.., in], which
// `inputs` names: sums[r * OUTS + o]; if NORM, of x times norm [in], and of the sums of x^2: squares[r].
// The loop is not unrolled: its instructions are fetched once, and fewer registers let more run.
template <typename T, int OUTS, int ROWS, int IN, bool NORM, typename W, typename X, typename I, typename N, typename P>
HELPER void row_dots(W features, X x, I inputs, N norm, uint lane, P sums, P squares) {
#pragma unroll
  for (int i = 0; i < ROWS * OUTS; ++i) {
    sums[i] = 0.0f;
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    squares[r] = 0.0f;
  }
  decltype(features[0].load(0)) next[OUTS];
  const int chunks = IN / next[0].values;
#pragma unroll
  for (int o = 0; o < OUTS; ++o) {
    next[o] = features[o].load(metal::min(int(lane), chunks - 1));
  }
#pragma unroll 1
  for (int i = lane; i < chunks; i += 32) {
    decltype(features[0].load(0)) chunk[OUTS];
#pragma unroll
    for (int o = 0; o < OUTS; ++o) {
      chunk[o] = next[o];
      next[o] = features[o].load(metal::min(i + 32, chunks - 1));  // on its way meanwhile
    }
    add_chunks<T, OUTS, ROWS, IN, NORM>(chunk, i * chunk[0].values, x, inputs, norm, sums, squares);
  }
}

// Features `feature` .. + FEATURES - 1 of silu(gate h) * (up h), h = rms_norm(x), for the ROWS
// lowest rows of the mask (all if they are fewer) -> out [rows * TOP_K, inner] at the place of the
// pair, [rows, inner] if TOP_K is 0. gate, up: from the expert's first row on.
template <typename T, int ROWS, int FEATURES, int IN, int TOP_K, typename W, typename X, typename N, typename E, typename O>
HELPER void expert_hidden(W gate, W up, int in, int inner, int feature, X x, N norm, float eps, uint mask, int expert, E experts, O out, uint lane) {
  const int each = 2 * FEATURES;
  W features[each];
#pragma unroll
  for (int f = 0; f < FEATURES; ++f) {
    features[f] = gate.row(feature + f);
    features[FEATURES + f] = up.row(feature + f);
    features[f].in = in;
    features[FEATURES + f].in = in;
  }
  int inputs[ROWS];
  int count = metal::min(int(metal::popcount(mask)), ROWS);
  uint left = mask;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    inputs[r] = lowest_bit(left != 0 ? left : mask);
    left &= left - 1u;
  }
  float sums[ROWS * each];
  float squares[ROWS];
  row_dots<T, each, ROWS, IN, true>(features, x, inputs, norm, lane, sums, squares);
  // a lane has the same row in both, and the lane ROWS away the same feature of the other matrix
  float square = simd_sums<ROWS>(squares, lane);
  float sum = simd_sums<ROWS * each>(sums, lane);
  sum = sum * metal::rsqrt(square / float(IN) + eps);
  float other = simd_shuffle_xor(sum, uint(ROWS));
  int index = sum_of_lane<ROWS * each>(lane);
  int f = index % each;
  if (int(lane) < ROWS * each && f < FEATURES && index / each < count) {
    int row = lowest_bit(without_lowest(mask, index / each));
    int place = TOP_K == 0 ? row : row * TOP_K + rank_of<TOP_K>(experts + row * TOP_K, expert);
    out[place * inner + feature + f] = sum / (1.0f + metal::exp(-sum)) * other;
  }
}

// Features `at` .. + FEATURES - 1 of down h for `count` rows, up to ROWS: lane r says where the r-th
// row lies in hidden [.., inner], and in out [.., 8], where its outputs go. down: from feature 0 on.
template <int ROWS, int FEATURES, int IN, typename W, typename X, typename O>
HELPER void expert_outputs(W down, int in, X hidden, int count, int source, int place, O out, int at, uint lane) {
  W features[FEATURES];
#pragma unroll
  for (int f = 0; f < FEATURES; ++f) {
    features[f] = down.row(at + f);
    features[f].in = in;
  }
  int inputs[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    inputs[r] = simd_shuffle(source, uint(r));
  }
  float sums[ROWS * FEATURES];
  float squares[ROWS];
  row_dots<float, FEATURES, ROWS, IN, false>(features, hidden, inputs, hidden, lane, sums, squares);
  float sum = simd_sums<ROWS * FEATURES>(sums, lane);
  int index = sum_of_lane<ROWS * FEATURES>(lane);
  place = simd_shuffle(place, uint(index / FEATURES));
  if (int(lane) < ROWS * FEATURES && index / FEATURES < count) {
    out[place * 8 + at + index % FEATURES] = sum;
  }
}
