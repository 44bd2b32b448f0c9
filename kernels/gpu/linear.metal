// out = residual + W rms_norm(x): one simdgroup computes OUTS features of all rows.
// x T [rows, in], rows <= ROWS; W [outs, in]: data uint [outs, in * BITS / 32] and scales, biases
// T [outs, in / GROUP], or data T [outs, in] when BITS is 0; norm T [in] and eps float [1] if NORM;
// residual T [rows, outs] if RESIDUAL -> out T [rows, outs]. What is not used may be any array.
uint lane = thread_index_in_simdgroup;
int rows = x_shape[0];
int in = x_shape[1];
int outs = data_shape[0];
int first = OUTS * (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
if (first < outs) {
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
  dots<T, OUTS, ROWS, (ROWS < 4 ? ROWS : 4), NORM>(features, x, inputs, rows, norm, lane, sums, squares);
  // one sum for each lane: of 32 / OUTS rows at a time, if there are more
  constexpr int SHARE = ROWS * OUTS < 32 ? ROWS : 32 / OUTS;
#pragma unroll
  for (int r = 0; r < ROWS; r += SHARE) {
    float y = simd_sums<SHARE * OUTS>(sums + r * OUTS, lane);
    float square = NORM ? simd_sums<SHARE>(squares + r, lane) : 0.0f;
    float scale = NORM ? metal::rsqrt(metal::fma(square, 1.0f / float(in), eps[0])) : 1.0f;
    int index = sum_of_lane<SHARE * OUTS>(lane);
    int row = r + index / OUTS;
    int feature = first + index % OUTS;
    if (int(lane) < SHARE * OUTS && row < rows && feature < outs) {
      int at = row * outs + feature;
      out[at] = T(RESIDUAL ? metal::fma(y, scale, float(residual[at])) : y * scale);
    }
  }
}
