// out = residual + W rms_norm(x) on matrix units (tiles.h): SPLIT simdgroups compute 16 * TILES
// features of all rows, each from its share of the inputs.
// x T [rows, in], rows <= 8 * ROW_TILES; W [outs, in] of BITS 4, 8 or 0 as in linear.metal; norm
// T [in] and eps float [1] if NORM; residual T [rows, outs] if RESIDUAL -> out T [rows, outs].
// SPLIT shares of UNROLL groups each, or a multiple. What is not used may be any array.
constexpr int FEATURES = 16 * TILES;
constexpr int ROWS = 8 * ROW_TILES;
constexpr int STRIDE = FEATURES + 4;  // lanes of a tile write to different banks
SHARED(float, shares, SIMDGROUPS * ROWS * STRIDE);
SHARED(float, lengths, SIMDGROUPS * ROWS);
uint lane = thread_index_in_simdgroup;
int simdgroup = simdgroup_index_in_threadgroup;
int part = simdgroup % SPLIT;
int rows = x_shape[0];
int in = x_shape[1];
int outs = data_shape[0];
int block = FEATURES * (SIMDGROUPS / SPLIT);  // features of the threadgroup
int first = block * int(threadgroup_position_in_grid.x);
int own_row = tile_row(lane);
int pair = 2 * tile_quarter(lane);
int features[2 * TILES];
#pragma unroll
for (int f = 0; f < 2 * TILES; ++f) {
  features[f] = metal::min(first + simdgroup / SPLIT * FEATURES + 8 * f + own_row, outs - 1);
}
decltype(data) matrix[TILES];
decltype(scales) matrix_scales[TILES];
decltype(scales) matrix_biases[TILES];
#pragma unroll
for (int t = 0; t < TILES; ++t) {
  matrix[t] = data;
  matrix_scales[t] = scales;
  matrix_biases[t] = biases;
}
int inputs[ROW_TILES];
#pragma unroll
for (int r = 0; r < ROW_TILES; ++r) {
  inputs[r] = metal::min(8 * r + own_row, rows - 1);
}
float sums[TILES * ROW_TILES * 4];
float squares[ROW_TILES * 4];
int groups = in / TileStep<BITS, GROUP>::group / SPLIT;
tile_dots<T, BITS, GROUP, TILES, ROW_TILES, UNROLL, NORM ? TIMES_NORM : PLAIN, false>(matrix, matrix_scales, matrix_biases, features, x, inputs, inputs, in, norm, part * groups, part * groups + groups, lane, sums, squares);
#pragma unroll
for (int i = 0; i < TILES * ROW_TILES * 4; ++i) {
  int feature = i / (4 * ROW_TILES) * 16 + i % 4 / 2 * 8 + own_row;
  int row = i / 4 % ROW_TILES * 8 + pair + i % 2;
  shares[(simdgroup * ROWS + row) * STRIDE + feature] = sums[i];
}
if (NORM && tile_square(lane)) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    lengths[simdgroup * ROWS + 8 * r + own_row] = own_row % 2 ? squares[4 * r + 1] : squares[4 * r];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = int(thread_index_in_threadgroup); i < rows * block; i += 32 * SIMDGROUPS) {
  int row = i / block;
  int feature = first + i % block;
  int from = i % block / FEATURES * SPLIT;
  float y = 0.0f;
  float square = 0.0f;
#pragma unroll
  for (int p = 0; p < SPLIT; ++p) {
    y = y + shares[((from + p) * ROWS + row) * STRIDE + i % FEATURES];
    square = NORM ? square + lengths[(from + p) * ROWS + row] : 0.0f;
  }
  if (feature < outs) {
    float scale = NORM ? metal::rsqrt(metal::fma(square, 1.0f / float(in), eps[0])) : 1.0f;
    int at = row * outs + feature;
    out[at] = T(RESIDUAL ? metal::fma(y, scale, float(residual[at])) : y * scale);
  }
}
