// Rows of an embedding, decoded: out[r] = W[ids[r]], one thread for each chunk of each row.
// ids int [rows]; W [vocabulary, hidden] as in linear.metal -> out T [rows, hidden]
int hidden = data_shape[1] * 32 / (BITS == 0 ? 32 : BITS);
auto matrix = weights<T, BITS, GROUP>(data, scales, biases, hidden);
int chunks = matrix.chunks();
int row = thread_position_in_grid.x / chunks;
int i = thread_position_in_grid.x % chunks;
if (row < ids_shape[0]) {
  auto chunk = matrix.row(ids[row]).load(i);
#pragma unroll
  for (int e = 0; e < chunk.values / 8; ++e) {
    float w[8];
    chunk.decode(e, w);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      out[row * hidden + i * chunk.values + 8 * e + k] = T(w[k]);
    }
  }
}
