// Products on matrix units: 16 features by 8 rows at once, by one simdgroup, T of 16 bits. After words.h.
//
// A lane has tile_row(lane) = 0 .. 7 and tile_quarter(lane) = 0 .. 3. It brings weights of the
// features tile_row and tile_row + 8 and values of row tile_row of x, of each the same inputs,
// those of its quarter; and it gets sums of the features tile_row and tile_row + 8 for the rows
// 2 * quarter and 2 * quarter + 1. Which inputs stand side by side in a product is free, so codes
// are taken as they lie in a word, and the values of x are brought into their order.
//
// Codes are multiplied as the integers they are, exactly: as bits of the mantissa of OFFSET a code
// is worth OFFSET + code, of codes of 8 bits each half is one of its own. A group's sum is
//   scale * (sum (OFFSET + code) x - OFFSET sum x) + bias sum x
// and `sum x` comes from a product with ones, so that what is subtracted is what was added; of normed
// rows it is known.
// Inf in x gives NaN, and so does a group of which 2176 sum |x| (16 x, of 8 bits) overflows float.
//
//   tile_dots<T, BITS, GROUP, TILES, ROW_TILES, UNROLL, X_KIND, LATE>(
//       data, scales, biases, features, x, rows, sum_rows, in, norm, from, to, lane, sums, squares);
//
// data[TILES], scales[TILES], biases[TILES]: the matrix of each tile as in weights.h, BITS 4, 8, or
// 0 for dense, UNROLL groups' scales from a whole multiple of their size on; features[2 * TILES]:
// rows of weights, of this lane; x T [.., in] as it is (PLAIN), or multiplied with norm T [in]
// (TIMES_NORM), or normed rows (NORMED: normed.h); rows[ROW_TILES]: rows of x, of this lane;
// sum_rows[2 * ROW_TILES], if NORMED: those of which it gets sums; from .. to: groups of GROUP inputs
// (of 32 when dense), from a multiple of UNROLL on, a multiple of UNROLL many. LATE: x is not read
// before the weights have come: fewer registers, so that more simdgroups wait for weights at once. It
// and UNROLL change no bits.
// Set: sums[(tile * ROW_TILES + row tile) * 4 ..]: feature tile_row with both rows, then
// tile_row + 8; if TIMES_NORM, squares[row tile * 4 ..]: products of rows of x with each other,
// tile_row with both, so each row's sum of x^2 is in one lane (tile_square).
// The bits of a sum depend on its row of x, its weights and from, to alone.

enum XKind { PLAIN, TIMES_NORM, NORMED };

template <typename T>
HELPER uint both_halves(float value) {
  uint bits = as_type<ushort>(T(value));
  return bits | bits << 16;
}

// what four lanes read of a row at once
template <int BITS, int GROUP>
struct TileStep {
  enum {
    inputs = BITS == 0 || GROUP == 32 ? 32 : 64,
    each = inputs / 4,  // of a lane
    words = each * (BITS == 0 ? 16 : BITS) / 32,
    pairs = each * (BITS == 8 ? 2 : 1) / 2,
    group = BITS == 0 ? 32 : GROUP,
    count = group / inputs  // of a group
  };
};

// the weights of pair p, of codes OFFSET + code; offset_pair: OFFSET, 128 in bfloat, in both halves
template <int BITS, typename P>
HELPER uint weight_pair(P words, int p, uint offset_pair) {
  return BITS == 0 ? words[p] : ((words[p / 4] >> (4 * (p % 4))) & 0x000f000fu) | offset_pair;
}

// the values of x that pair p is multiplied with, of x as it lies in memory
template <typename T, int BITS, typename P>
HELPER uint input_pair(P x, int p) {
  if (BITS == 0) {
    return x[p];
  }
  if (BITS == 4) {
    int at = p / 4 * 4 + p % 4 / 2;
    return p % 2 ? upper_halves(x[at], x[at + 2]) : lower_halves(x[at], x[at + 2]);
  }
  int at = p / 4 * 2;
  uint pair = p % 4 / 2 ? upper_halves(x[at], x[at + 1]) : lower_halves(x[at], x[at + 1]);
  return p % 2 ? pair_product<T>(pair, both_halves<T>(16.0f)) : pair;
}

// of COUNT groups side by side, all at once, as they are: two in a word
template <int COUNT, typename S, typename P>
HELPER void load_scales(S scales, P words) {
  if (COUNT == 1) {
    words[0] = as_type<ushort>(scales[0]);
  } else {
    load_words<(COUNT > 1 ? COUNT / 2 : 1)>(scales, words);
  }
}

template <typename T, typename P>
HELPER float scale_of(P words, int group) {
  return float(as_type<T>(ushort(words[group / 2] >> (16 * (group % 2)))));
}

// where the sum of squares of row r is: in squares[tile_row % 2] of the lane of which this is true
HELPER bool tile_square(uint lane) {
  return tile_quarter(lane) == tile_row(lane) / 2;
}

// of ROW_TILES rows of x, `stride` apart, a lane's share of a step, and of their weights
template <int HALVES, int ROW_TILES, bool NORM, typename X, typename R, typename N, typename P>
HELPER void load_inputs(X x, R rows, int stride, N norm, int first, P values, P weights) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    load_words<HALVES>(x + ulong(rows[r]) * uint(stride) + first * 2 / int(sizeof(*x)), values + r * HALVES);
  }
  if (NORM) {
    load_words<HALVES>(norm + first, weights);
  }
}

template <typename T, int BITS, int GROUP, int TILES, int ROW_TILES, int UNROLL, XKind X_KIND, bool LATE, typename D, typename S, typename F, typename X, typename R, typename M, typename N, typename P, typename Q>
HELPER void tile_dots(D data, S scales, S biases, F features, X x, R rows, M sum_rows, int in, N norm, int from, int to, uint lane, P sums, Q squares) {
  using Step = TileStep<BITS, GROUP>;
  const bool NORM = X_KIND == TIMES_NORM;
  const int stride = X_KIND == NORMED ? normed_words(in) : in;
  const int steps = UNROLL * Step::count;
  const int halves = Step::each / 2;  // words of x in a step
  const int packs = UNROLL > 1 ? UNROLL / 2 : 1;  // words of scales
  const int span = Step::words * 4 * int(sizeof(uint) / sizeof(*data[0]));  // elements of data in a step
  const int quarter = tile_quarter(lane);
  const uint ones = both_halves<T>(1.0f);
  // unknown to the compiler, which makes one instruction of `and` and `or` with one constant only
  const uint offset_pair = 0x43004300u | (uint(features[0]) >> 31);
#pragma unroll
  for (int i = 0; i < TILES * ROW_TILES * 4; ++i) {
    sums[i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < ROW_TILES * 4; ++i) {
    squares[i] = 0.0f;
  }
#pragma unroll 1
  for (int group = from; group < to; group += UNROLL) {
    // all weights that are read, before any of them is used: the longest way first
    uint words[steps * 2 * TILES * Step::words];
    uint factors[packs * 2 * TILES];
    uint offsets[packs * 2 * TILES];
    uint values[steps * ROW_TILES * halves];
    uint weights[NORM ? steps * halves : 1];
#pragma unroll
    for (int f = 0; f < 2 * TILES; ++f) {
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        auto row = data[f / 2] + ulong(features[f]) * uint(in / Step::inputs * span);
        auto own = row + (group * Step::count + s) * span + quarter * (span / 4);
        load_words<Step::words>(own, words + (s * 2 * TILES + f) * Step::words);
      }
    }
    if (BITS != 0) {
#pragma unroll
      for (int f = 0; f < 2 * TILES; ++f) {
        ulong at = ulong(features[f]) * uint(in / Step::group) + uint(group);
        load_scales<UNROLL>(scales[f / 2] + at, factors + f * packs);
        load_scales<UNROLL>(biases[f / 2] + at, offsets + f * packs);
      }
    }
    if (!LATE) {
#pragma unroll
      for (int s = 0; s < steps; ++s) {
        load_inputs<halves, ROW_TILES, NORM>(x, rows, stride, norm, (group * Step::count + s) * Step::inputs + quarter * Step::each, values + s * ROW_TILES * halves, weights + (NORM ? s * halves : 0));
      }
    }
    simdgroup_barrier(mem_flags::mem_none);  // no load is put off until it is needed
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float parts[TILES * ROW_TILES * 4];
      float totals[ROW_TILES * 4];  // of x, for both rows of the lane twice
#pragma unroll
      for (int i = 0; i < TILES * ROW_TILES * 4; ++i) {
        parts[i] = BITS == 0 ? sums[i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < ROW_TILES * 4; ++i) {
        totals[i] = 0.0f;
      }
      if (X_KIND == NORMED && BITS != 0) {
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; ++i) {
          auto row = x + ulong(sum_rows[i]) * uint(stride);
          float total = normed_sum(row, in, (group + u) * (Step::group / 32));
#pragma unroll
          for (int more = 1; more < Step::group / 32; ++more) {
            total = total + normed_sum(row, in, (group + u) * (Step::group / 32) + more);
          }
          totals[i / 2 * 4 + i % 2] = total;
        }
      }
#pragma unroll
      for (int s = u * Step::count; s < (u + 1) * Step::count; ++s) {
        if (LATE) {
          load_inputs<halves, ROW_TILES, NORM>(x, rows, stride, norm, (group * Step::count + s) * Step::inputs + quarter * Step::each, values + s * ROW_TILES * halves, weights + (NORM ? s * halves : 0));
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          auto own = values + (s * ROW_TILES + r) * halves;
          if (NORM) {
#pragma unroll
            for (int i = 0; i < halves; i += 2) {
              tile_multiply<T>(squares + 4 * r, own[i], 0u, own[i + 1], 0u, tile_input(own[i], lane), tile_input(own[i + 1], lane));
              own[i] = pair_product<T>(own[i], weights[s * halves + i]);
              own[i + 1] = pair_product<T>(own[i + 1], weights[s * halves + i + 1]);
            }
          }
#pragma unroll
          for (int p = 0; p < Step::pairs; p += 2) {
            uint one = tile_input(input_pair<T, BITS>(own, p), lane);
            uint other = tile_input(input_pair<T, BITS>(own, p + 1), lane);
            if (X_KIND != NORMED && BITS != 0) {
              tile_multiply<T>(totals + 4 * r, ones, ones, ones, ones, one, other);
            }
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
              auto upper = words + (s * 2 * TILES + 2 * t) * Step::words;
              auto lower = upper + Step::words;
              tile_multiply<T>(parts + (t * ROW_TILES + r) * 4, weight_pair<BITS>(upper, p, offset_pair), weight_pair<BITS>(lower, p, offset_pair), weight_pair<BITS>(upper, p + 1, offset_pair), weight_pair<BITS>(lower, p + 1, offset_pair), one, other);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < TILES * ROW_TILES * 4; ++i) {
        if (BITS == 0) {
          sums[i] = parts[i];
        } else {
          int f = i / (4 * ROW_TILES) * 2 + i % 4 / 2;
          float total = totals[i / 4 % ROW_TILES * 4 + i % 2];
          float factor = scale_of<T>(factors + f * packs, u);
          float offset = scale_of<T>(offsets + f * packs, u);
          // of 8 bits x is multiplied twice, once as 16 x, and products with ones are of both
          float added = BITS == 8 && X_KIND == NORMED ? 17.0f * total : total;
          float once = BITS == 8 && X_KIND != NORMED ? offset / 17.0f : offset;
          sums[i] = metal::fma(factor, metal::fma(-128.0f, added, parts[i]), sums[i]);
          sums[i] = metal::fma(once, total, sums[i]);
        }
      }
    }
  }
}
