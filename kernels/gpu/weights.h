// Rows of weights in chunks, dense or packed as MLX packs them: loaded first, decoded later. After words.h.
//
//   auto matrix = weights<T, BITS, GROUP>(data, scales, biases, in);  // or a stack of matrices
//   auto row = matrix.row(index);                  // slot * out + feature in a stack
//   auto chunk = row.load(i);                      // i < matrix.chunks(), chunk.values of a row
//   chunk.decode(eighth, w);                       // float w[8]: the 8 values from 8 * eighth on
//   auto eight = LOAD(Eight<T>, x + 8 * i);        // eight.get(k), k = 0 .. 7: values as float
//
// T: type of scales, biases and dense weights. BITS: 2, 3, 4, 5, 6, 8, or 0 for dense weights,
// whose scales and biases are any arrays. GROUP: a multiple of 32. in: a multiple of GROUP, of 8
// when dense. data must have 8 elements or more.

// eight values side by side: 16 bytes at once, or twice 16 of float
template <typename T>
struct alignas(16) Eight {
  T value[8];

  HELPER float get(int k) {
    return float(value[k]);
  }
};

template <>
struct alignas(16) Eight<bfloat> {
  uint pair[4];

  // the upper half of a float each
  HELPER float get(int k) {
    return as_type<float>(k % 2 ? pair[k / 2] & 0xffff0000u : pair[k / 2] << 16);
  }
};

template <typename T, int BITS>
struct Chunk {
  // of 16 codes, so that lanes that stand side by side read x side by side, if these are whole words
  enum { values = BITS % 2 ? 32 : 16, words = values * BITS / 32 };
  uint word[words];
  float scale;
  float bias;
  uint one;  // 1.0f

  // A code becomes a float without a conversion: as bits of the mantissa of 1.0 it is worth
  // 1 + code / 2^power, and scale * code + bias = 2^power * scale * (1 + code / 2^power)
  // + (bias - 2^power * scale), rounded once if scales have 16 bits. Short codes that stand side by
  // side are brought to the top of the mantissa together.
  template <typename P>
  HELPER void decode(int eighth, P out) {
    const int width = BITS == 2 ? 4 : BITS == 4 ? 8 : BITS;
    const int low = 23 - width;  // where the lowest bit of what is shifted together comes to stand
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int bit = (8 * eighth + i) * BITS;
      int within = bit % width;
      int from = (bit - within) % 32;
      int at = (bit - within) / 32;
      uint moved = from <= low ? word[at] << (low - from) : word[at] >> (from - low);
      if (from + width > 32) {
        moved |= word[at + 1 < words ? at + 1 : at] << (32 - from + low);
      }
      uint mask = ((1u << BITS) - 1u) << (low + within);
      float times = scale * float(1 << (width - within));
      out[i] = metal::fma(times, as_type<float>((moved & mask) | one), bias - times);
    }
  }
};

template <typename T>
struct Chunk<T, 0> {
  enum { values = 8 };
  Eight<T> dense;

  template <typename P>
  HELPER void decode(int, P out) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] = dense.get(i);
    }
  }
};

// a matrix, or from one of its rows on
template <typename T, int BITS, int GROUP, typename D, typename S>
struct Weights {
  D data;
  S scales;
  S biases;
  int in;

  HELPER int chunks() {
    return in / Chunk<T, BITS>::values;
  }

  HELPER Weights row(uint index) {
    Weights moved = *this;
    moved.data = data + ulong(index) * uint(in / 32 * BITS);
    moved.scales = scales + ulong(index) * uint(in / GROUP);
    moved.biases = biases + ulong(index) * uint(in / GROUP);
    return moved;
  }

  HELPER Chunk<T, BITS> load(int i) {
    Chunk<T, BITS> chunk;
    load_words<Chunk<T, BITS>::words>(data + i * Chunk<T, BITS>::words, chunk.word);
    chunk.scale = float(scales[i * Chunk<T, BITS>::values / GROUP]);
    chunk.bias = float(biases[i * Chunk<T, BITS>::values / GROUP]);
    // unknown to the compiler, which makes one instruction of `and` and `or` with one constant only
    chunk.one = 0x3f800000u | (uint(in) >> 31);
    return chunk;
  }
};

template <typename T, int GROUP, typename D, typename S>
struct Weights<T, 0, GROUP, D, S> {
  D data;
  S scales;
  S biases;
  int in;

  HELPER int chunks() {
    return in / 8;
  }

  HELPER Weights row(uint index) {
    Weights moved = *this;
    moved.data = data + ulong(index) * uint(in);
    return moved;
  }

  HELPER Chunk<T, 0> load(int i) {
    Chunk<T, 0> chunk;
    chunk.dense = LOAD(Eight<T>, data + 8 * i);
    return chunk;
  }
};

template <typename T, int BITS, int GROUP, typename D, typename S>
HELPER Weights<T, BITS, GROUP, D, S> weights(D data, S scales, S biases, int in) {
  Weights<T, BITS, GROUP, D, S> matrix;
  matrix.data = data;
  matrix.scales = scales;
  matrix.biases = biases;
  matrix.in = in;
  return matrix;
}
