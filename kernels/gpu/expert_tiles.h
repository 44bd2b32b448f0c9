// What an expert computes on matrix units. After bits.h, entries.h, normed.h and tiles.h.

// A matrix of T as tile_dots takes it: one pointer of each kind for each of TILES tiles.
template <int TILES, typename D, typename S>
struct TileWeights {
  D data[TILES];
  S scales[TILES];
  S biases[TILES];
};

template <typename D, typename S>
HELPER TileWeights<1, D, S> tile_weights(D data, S scales, S biases) {
  TileWeights<1, D, S> one;
  one.data[0] = data;
  one.scales[0] = scales;
  one.biases[0] = biases;
  return one;
}

template <typename D, typename S>
HELPER TileWeights<2, D, S> tile_weights(D data, S scales, S biases, D up, S up_scales, S up_biases) {
  TileWeights<2, D, S> two;
  two.data[0] = data;
  two.scales[0] = scales;
  two.biases[0] = biases;
  two.data[1] = up;
  two.scales[1] = up_scales;
  two.biases[1] = up_biases;
  return two;
}

// which of the mask's rows is number n, its lowest if it has not so many; without a loop of n turns
HELPER int row_number(uint mask, int n) {
  int row = 0;
  int left = int(metal::popcount(mask)) > n ? n : 0;
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    int below = int(metal::popcount((mask >> row) & ((1u << width) - 1u)));
    row = left >= below ? row + width : row;
    left = left >= below ? left - below : left;
  }
  return row;
}

// Features first .. + 16 * SIMDGROUPS / SPLIT - 1 of silu(gate h) * (up h), h = rms_norm(x), by a
// threadgroup for the rows of a mask, x as normed rows (normed.h) -> out T [rows * TOP_K, inner] at the
// places of the pairs, [rows, inner] if TOP_K is 0. A simdgroup has 16 rows of gate and of up, and a
// share of the inputs in SPLIT.
// both: gate and up, of which feature 0 is row `base`; shares: threadgroup memory.
template <typename T, int BITS, int GROUP, int SPLIT, int SIMDGROUPS, int UNROLL, int TOP_K, typename W, typename X, typename E, typename O, typename P>
HELPER void tile_hidden(W both, int base, int in, int inner, int first, X x, uint mask, int expert, E experts, O out, P shares, int self) {
  const int stride = 36;  // of 32 features: lanes of a tile write to different banks
  const int block = 16 * (SIMDGROUPS / SPLIT);
  uint lane = uint(self % 32);
  int simdgroup = self / 32;
  int own_row = tile_row(lane);
  int pair = 2 * tile_quarter(lane);
  int groups = in / TileStep<BITS, GROUP>::group / SPLIT;
  int from = simdgroup % SPLIT * groups;
  int features[4];  // as an inner size is a multiple of 16, so that the second is always 8 further
  features[0] = base + metal::min(first + simdgroup / SPLIT * 16, inner - 16) + own_row;
  features[1] = features[0] + 8;
  features[2] = features[0];
  features[3] = features[1];
#pragma unroll 1
  for (uint left = mask; left != 0; left = without_lowest(left, 8)) {
    int count = metal::min(int(metal::popcount(left)), 8);
    int inputs[1];
    inputs[0] = row_number(left, own_row);
    int summed[2];
    summed[0] = row_number(left, pair);
    summed[1] = row_number(left, pair + 1);
    float sums[8];
    float none[4];
    tile_dots<T, BITS, GROUP, 2, 1, UNROLL, NORMED, true>(both.data, both.scales, both.biases, features, x, inputs, summed, in, x, from, from + groups, lane, sums, none);
    if (left != mask) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the rows before these have been read
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      shares[(simdgroup * 8 + pair + i % 2) * stride + i / 2 * 8 + own_row] = sums[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = self; i < count * block; i += 32 * SIMDGROUPS) {
      int n = i / block;
      int feature = first + i % block;
      int start = i % block / 16 * SPLIT;
      float gated = 0.0f;
      float upper = 0.0f;
#pragma unroll
      for (int p = start; p < start + SPLIT; ++p) {
        gated = gated + shares[(p * 8 + n) * stride + i % 16];
        upper = upper + shares[(p * 8 + n) * stride + 16 + i % 16];
      }
      if (feature < inner) {
        int row = row_number(left, n);
        float scale = normed_factor(x + row * normed_words(in), in);
        gated = gated * scale;
        int place = TOP_K == 0 ? row : row * TOP_K + rank_of<TOP_K>(experts + row * TOP_K, expert);
        out[place * inner + feature] = T(gated / (1.0f + metal::exp(-gated)) * (upper * scale));
      }
    }
  }
}

// 16 features, from row `base` of down, of down h for up to 8 rows by one simdgroup: lane r says where
// the r-th row lies in hidden T [.., inner] and, if r < count, where in out [.., 16] its outputs go.
template <typename T, int BITS, int GROUP, int UNROLL, typename W, typename X, typename P>
HELPER void tile_outputs(W down, int base, int inner, X hidden, int count, int source, int place, P out, uint lane) {
  int own_row = tile_row(lane);
  int pair = 2 * tile_quarter(lane);
  int features[2];
  features[0] = base + own_row;
  features[1] = base + own_row + 8;
  int inputs[1];
  inputs[0] = simd_shuffle(source, uint(own_row));
  float sums[4];
  float none[4];
  tile_dots<T, BITS, GROUP, 1, 1, UNROLL, PLAIN, true>(down.data, down.scales, down.biases, features, hidden, inputs, inputs, inner, hidden, 0, inner / TileStep<BITS, GROUP>::group, lane, sums, none);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    int at = 16 * simd_shuffle(place, uint(pair + k)) + own_row;
    if (pair + k < count) {
      out[at] = sums[k];
      out[at + 8] = sums[2 + k];
    }
  }
}
