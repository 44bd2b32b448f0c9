// out[row] = sum of x[row, :columns], one threadgroup per row, in one fixed order.
// x T [rows, columns], columns int [1] -> out float [rows]
uint row = threadgroup_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
uint simdgroup = simdgroup_index_in_threadgroup;
SHARED(float, partial, THREADS / 32);

auto x_row = x + row * columns[0];
float sum = 0.0f;
for (int i = thread_position_in_threadgroup.x; i < columns[0]; i += THREADS) {
  sum += float(x_row[i]);
}
sum = simd_sum(sum);
if (lane == 0) {
  partial[simdgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simdgroup == 0) {
  sum = simd_sum(lane < THREADS / 32 ? partial[lane] : 0.0f);
  if (lane == 0) {
    out[row] = T(sum);
  }
}
