// Dot products of OUTS rows of weights with up to ROWS rows of x, by one of SPLIT simdgroups, which
// take the inputs in turns. Each weight is read and decoded once for all rows. After weights.h.
//
//   decltype(matrix) features[OUTS];         // rows of weights, each matrix.row(index)
//   int inputs[ROWS];                        // which rows of x; from `count` on any that exist
//   float sums[ROWS * OUTS];                 // set: lane's share for row r, feature o: [r * OUTS + o]
//   float squares[ROWS];                     // set if NORM: lane's share of the sum of x^2
//   dots<T, OUTS, ROWS, STEP, SPLIT, NORM>(features, x, inputs, count, norm, part, lane, sums, squares);
//   simd_sums<ROWS * OUTS>(sums, lane);      // of simd_sums.h: the products, one in each lane
//   simd_sums<ROWS>(squares, lane);          // and to the same lanes the squares of their rows
//
// x T [.., in]; norm T [in], multiplied to x if NORM, else anything. count: 1 .. ROWS, the same in
// all lanes; rows are computed by STEP (a divisor of ROWS) until there are `count`, sums of the rest
// are to be ignored. Where most calls have few rows STEP = 1 saves work, else 4 hides latency.
// The bits of a sum depend on the row of x, that of the weights, the format and SPLIT alone.
// The loop is not unrolled: its instructions are fetched once, and fewer registers let more run.
template <int OUTS, bool NORM, typename E, typename S, typename P>
HELPER void add_eight(E eight, S scale, S w, P sums, P square) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    float value = eight.get(k);
    if (NORM) {
      square[0] = metal::fma(value, value, square[0]);
      value = value * scale[k];
    }
#pragma unroll
    for (int o = 0; o < OUTS; ++o) {
      sums[o] = metal::fma(value, w[8 * o + k], sums[o]);
    }
  }
}

template <typename T, int OUTS, int ROWS, int STEP, int SPLIT, bool NORM, typename W, typename X, typename I, typename N, typename P>
HELPER void dots(W features, X x, I inputs, int count, N norm, int part, uint lane, P sums, P squares) {
#pragma unroll
  for (int i = 0; i < ROWS * OUTS; ++i) {
    sums[i] = 0.0f;
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    squares[r] = 0.0f;
  }
  int in = features[0].in;
  int chunks = features[0].chunks();
  decltype(features[0].load(0)) next[OUTS];
  const int from_here = 32 * part + int(lane);
  if (from_here < chunks) {
#pragma unroll
    for (int o = 0; o < OUTS; ++o) {
      next[o] = features[o].load(from_here);
    }
  }
#pragma unroll 1
  for (int i = from_here; i < chunks; i += 32 * SPLIT) {
    decltype(features[0].load(0)) chunk[OUTS];
#pragma unroll
    for (int o = 0; o < OUTS; ++o) {
      chunk[o] = next[o];
      if (i + 32 * SPLIT < chunks) {
        next[o] = features[o].load(i + 32 * SPLIT);  // on its way while this one is used
      }
    }
#pragma unroll
    for (int e = 0; e < chunk[0].values / 8; ++e) {
      float w[OUTS * 8];
#pragma unroll
      for (int o = 0; o < OUTS; ++o) {
        chunk[o].decode(e, w + 8 * o);
      }
      int at = i * chunk[0].values + 8 * e;
      float scale[8];
      if (NORM) {
        auto eight = LOAD(Eight<T>, norm + at);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          scale[k] = eight.get(k);
        }
      }
#pragma unroll
      for (int from = 0; from < ROWS; from += STEP) {
        if (from == 0 || from < count) {
          Eight<T> eights[STEP];
#pragma unroll
          for (int r = 0; r < STEP; ++r) {
            eights[r] = LOAD(Eight<T>, x + inputs[from + r] * in + at);
          }
#pragma unroll
          for (int r = 0; r < STEP; ++r) {
            add_eight<OUTS, NORM>(eights[r], scale, w, sums + (from + r) * OUTS, squares + from + r);
          }
        }
      }
    }
  }
}
