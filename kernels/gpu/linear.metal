// out = residual + W rms_norm(x): SPLIT simdgroups compute OUTS features of all rows, each from its
// share of the inputs.
// x T [rows, in], rows <= ROWS; W [outs, in]: data uint [outs, in * BITS / 32] and scales, biases
// T [outs, in / GROUP], or data T [outs, in] when BITS is 0; norm T [in] and eps float [1] if NORM;
// residual T [rows, outs] if RESIDUAL -> out T [rows, outs]. What is not used may be any array.
constexpr int SHARE = ROWS * OUTS < 32 ? ROWS : 32 / OUTS;  // rows of which a lane has one sum
constexpr int ROUNDS = ROWS / SHARE;
SHARED(float, shares, (SPLIT > 1 ? SIMDGROUPS * ROUNDS * 64 : 1));
uint lane = thread_index_in_simdgroup;
int simdgroup = simdgroup_index_in_threadgroup;
int part = simdgroup % SPLIT;
int rows = x_shape[0];
int in = x_shape[1];
int outs = data_shape[0];
int first = OUTS * (int(threadgroup_position_in_grid.x) * (SIMDGROUPS / SPLIT) + simdgroup / SPLIT);
auto matrix = weights<T, BITS, GROUP>(data, scales, biases, in);
decltype(matrix) features[OUTS];
#pragma unroll
for (int o = 0; o < OUTS; ++o) {
  features[o] = matrix.row(metal::min(first + o, outs - 1));
}
int inputs[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  inputs[r] = metal::min(r, rows - 1);
}
float sums[ROWS * OUTS];
float squares[ROWS];
dots<T, OUTS, ROWS, (ROWS < 4 ? ROWS : 4), SPLIT, NORM>(features, x, inputs, rows, norm, part, lane, sums, squares);
float ys[ROUNDS];
float square[ROUNDS];
#pragma unroll
for (int n = 0; n < ROUNDS; ++n) {
  ys[n] = simd_sums<SHARE * OUTS>(sums + n * SHARE * OUTS, lane);
  square[n] = NORM ? simd_sums<SHARE>(squares + n * SHARE, lane) : 0.0f;
  if (SPLIT > 1) {
    shares[(simdgroup * ROUNDS + n) * 64 + lane] = ys[n];
    shares[(simdgroup * ROUNDS + n) * 64 + 32 + lane] = square[n];
  }
}
if (SPLIT > 1) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (part == 0) {
#pragma unroll
  for (int n = 0; n < ROUNDS; ++n) {
#pragma unroll
    for (int other = 1; other < SPLIT; ++other) {
      ys[n] = ys[n] + shares[((simdgroup + other) * ROUNDS + n) * 64 + lane];
      square[n] = square[n] + shares[((simdgroup + other) * ROUNDS + n) * 64 + 32 + lane];
    }
    float scale = NORM ? metal::rsqrt(metal::fma(square[n], 1.0f / float(in), eps[0])) : 1.0f;
    int index = sum_of_lane<SHARE * OUTS>(lane);
    int row = n * SHARE + index / OUTS;
    int feature = first + index % OUTS;
    if (int(lane) < SHARE * OUTS && row < rows && feature < outs) {
      int at = row * outs + feature;
      out[at] = T(RESIDUAL ? metal::fma(ys[n], scale, float(residual[at])) : ys[n] * scale);
    }
  }
}
