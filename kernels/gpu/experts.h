// What an expert computes for up to ROWS rows at once, by one simdgroup. After weights.h, dots.h
// and simd_sums.h.

HELPER int lowest_bit(uint mask) {
  return int(metal::popcount((mask & (0u - mask)) - 1u));
}

// the mask without its `count` lowest rows
HELPER uint without_lowest(uint mask, int count) {
  for (int i = 0; i < count; ++i) {
    mask &= mask - 1u;
  }
  return mask;
}

// which of a row's experts this one is
template <int TOP_K, typename E>
HELPER int rank_of(E own, int expert) {
  int rank = 0;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    rank = own[k] == expert ? k : rank;
  }
  return rank;
}

// Features `feature` .. + FEATURES - 1 of silu(gate h) * (up h), h = rms_norm(x), for the ROWS
// lowest rows of the mask (all if they are fewer) -> out [rows * TOP_K, inner] at the place of the
// pair, [rows, inner] if TOP_K is 0. gate, up: from the expert's first row on.
template <typename T, int ROWS, int FEATURES, int TOP_K, typename W, typename X, typename N, typename E, typename O>
HELPER void expert_hidden(W gate, W up, int inner, int feature, X x, N norm, float eps, uint mask, int expert, E experts, O out, uint lane) {
  const int each = 2 * FEATURES;
  W features[each];
#pragma unroll
  for (int f = 0; f < FEATURES; ++f) {
    features[f] = gate.row(feature + f);
    features[FEATURES + f] = up.row(feature + f);
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
  dots<T, each, ROWS, 1, true>(features, x, inputs, count, norm, lane, sums, squares);
  // a lane has the same row in both, and the lane ROWS away the same feature of the other matrix
  float square = simd_sums<ROWS>(squares, lane);
  float sum = simd_sums<ROWS * each>(sums, lane);
  sum = sum * metal::rsqrt(square / float(gate.in) + eps);
  float other = simd_shuffle_xor(sum, uint(ROWS));
  int index = sum_of_lane<ROWS * each>(lane);
  int f = index % each;
  if (int(lane) < ROWS * each && f < FEATURES && index / each < count) {
    int row = lowest_bit(without_lowest(mask, index / each));
    int place = TOP_K == 0 ? row : row * TOP_K + rank_of<TOP_K>(experts + row * TOP_K, expert);
    out[place * inner + feature + f] = sum / (1.0f + metal::exp(-sum)) * other;
  }
}

// Features `feature` .. + FEATURES - 1 of down h for the ROWS lowest rows of the mask, h [.., inner]
// as expert_hidden leaves it -> out [rows, EACH, 8], a threadgroup's, from its feature `at` on:
// of each row the places of its experts, and after them, if TOP_K is 0, that of the shared one.
template <int ROWS, int FEATURES, int TOP_K, int EACH, typename W, typename X, typename E, typename O>
HELPER void expert_outputs(W down, int feature, X hidden, uint mask, int expert, E experts, O out, int at, uint lane) {
  W features[FEATURES];
#pragma unroll
  for (int f = 0; f < FEATURES; ++f) {
    features[f] = down.row(feature + at + f);
  }
  int count = metal::min(int(metal::popcount(mask)), ROWS);
  // lane r finds the place of the r-th row
  int own = int(lane) < count ? lowest_bit(without_lowest(mask, int(lane))) : lowest_bit(mask);
  int rank = TOP_K == 0 ? EACH - 1 : rank_of<TOP_K>(experts + own * TOP_K, expert);
  int source = TOP_K == 0 ? own : own * TOP_K + rank;
  int inputs[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    inputs[r] = simd_shuffle(source, uint(r));
  }
  float sums[ROWS * FEATURES];
  float squares[ROWS];
  dots<float, FEATURES, ROWS, 1, false>(features, hidden, inputs, count, hidden, lane, sums, squares);
  float sum = simd_sums<ROWS * FEATURES>(sums, lane);
  int index = sum_of_lane<ROWS * FEATURES>(lane);
  int place = simd_shuffle(own * EACH + rank, uint(index / FEATURES));
  if (int(lane) < ROWS * FEATURES && index / FEATURES < count) {
    out[place * 8 + at + index % FEATURES] = sum;
  }
}
