// Normed rows: x as many tiles of weights read it (tiles.h), so that none of them norms it again. T
// has 16 bits. Words of a row: T(x * norm), two in each; the sum of every 32 of them, float; the norm's
// factor, float; filled up to 16 bytes. After words.h.

HELPER int normed_words(int in) {
  return in / 2 + (in / 32 + 4) / 4 * 4;
}

// the sum of inputs 32 i .. 32 i + 31
template <typename P>
HELPER float normed_sum(P row, int in, int i) {
  return as_type<float>(uint(row[in / 2 + i]));
}

// 1 / sqrt(mean(x^2) + eps): what all that is made of the row is yet to be multiplied with
template <typename P>
HELPER float normed_factor(P row, int in) {
  return as_type<float>(uint(row[in / 2 + in / 32]));
}

// Write one, by a threadgroup: x, norm T [in], `in` a multiple of 32 and at most 32768. A simdgroup's
// turn is 256 inputs, and turns are added up in their order: no bit depends on how many there are.
// parts: float [128], of threadgroup memory
template <typename T, typename X, typename N, typename P, typename Q>
HELPER void norm_row(X x, N norm, float eps, int in, P row, Q parts, int self, int simdgroups) {
  int lane = self % 32;
  int turns = (in + 255) / 256;
  for (int turn = self / 32; turn < turns; turn += simdgroups) {
    int first = 256 * turn + 8 * lane;
    float square = 0.0f;
    float sum = 0.0f;
    if (first < in) {
      uint values[4];
      uint weights[4];
      load_words<4>(x + first, values);
      load_words<4>(norm + first, weights);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint pair = pair_product<T>(values[i], weights[i]);
#pragma unroll
        for (int bits = 0; bits < 32; bits += 16) {
          float own = float(as_type<T>(ushort(values[i] >> bits)));
          square = metal::fma(own, own, square);
          sum = sum + float(as_type<T>(ushort(pair >> bits)));
        }
        row[first / 2 + i] = pair;
      }
    }
    sum = sum + simd_shuffle_xor(sum, 1);
    sum = sum + simd_shuffle_xor(sum, 2);
    if (first < in && lane % 4 == 0) {
      row[in / 2 + first / 32] = as_type<uint>(sum);
    }
    square = simd_sum(square);
    if (lane == 0) {
      parts[turn] = square;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (self == 0) {
    float square = 0.0f;
    for (int turn = 0; turn < turns; ++turn) {
      square = square + parts[turn];
    }
    row[in / 2 + in / 32] = as_type<uint>(metal::rsqrt(metal::fma(square, 1.0f / float(in), eps)));
  }
}
