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
  for (int o = 0; o < OUTS; ++o) {
    features[o] = matrix.row(metal::min(first + o, outs - 1));
  }
  int inputs[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    inputs[r] = metal::min(r, rows - 1);
  }
  float sums[ROWS * OUTS];
  float squares[ROWS];
  dots<T, OUTS, ROWS, (ROWS < 4 ? ROWS : 4), NORM>(features, x, inputs, rows, norm, lane, sums, squares);
  for (int r = 0; r < ROWS; ++r) {
    if (r < rows) {
      float scale = NORM ? norm_scale(squares[r], in, eps[0]) : 1.0f;
      for (int o = 0; o < OUTS; ++o) {
        float y = simd_sum(sums[r * OUTS + o]);
        if (int(lane) == o && first + o < outs) {
          int at = r * outs + first + o;
          out[at] = T(RESIDUAL ? metal::fma(y, scale, float(residual[at])) : y * scale);
        }
      }
    }
  }
}
