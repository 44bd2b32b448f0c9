// out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight, one simdgroup per row.
// x T [rows, columns], weight T [columns], eps float [1] -> out T [rows, columns]
uint row = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
uint lane = thread_index_in_simdgroup;
int columns = x_shape[1];
if (int(row) < x_shape[0]) {
  auto x_row = x + row * columns;
  auto out_row = out + row * columns;
  float squares = 0.0f;
  for (int i = lane; i < columns; i += 32) {
    squares += square(float(x_row[i]));
  }
  float scale = metal::rsqrt(simd_sum(squares) / float(columns) + eps[0]);
  for (int i = lane; i < columns; i += 32) {
    out_row[i] = T(float(x_row[i]) * scale * float(weight[i]));
  }
}
