// What the kernels of experts share: the places of pairs of a row and an expert, and the sums of a row's
// outputs in the order of their ranks.

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

// What each of a row's outputs counts, those of its experts and last the shared expert's:
// amounts [rows, TOP_K + 1], by all threads. gates: rows of `columns` values, the shared expert's first.
template <int TOP_K, bool WITH_SHARED, typename F, typename G, typename P>
HELPER void set_amounts(F factors, G gates, int columns, int rows, P amounts, int self, int threads) {
  for (int i = self; i < rows * (TOP_K + 1); i += threads) {
    int row = i / (TOP_K + 1);
    int rank = i % (TOP_K + 1);
    if (rank < TOP_K) {
      amounts[i] = factors[row * TOP_K + rank];
    } else if (WITH_SHARED) {
      amounts[i] = 1.0f / (1.0f + metal::exp(-float(gates[row * columns])));
    }
  }
}

// outputs [rows, EACH, WIDTH] of the features `feature` .. + WIDTH - 1 as they are -> out O
// [rows, TOP_K, features], 0 where the table says -1.
template <typename O, int TOP_K, int EACH, int WIDTH, typename P, typename E, typename Q>
HELPER void keep_apart(P outputs, E experts, E table, int rows, int features, int feature, Q out, int self, int threads) {
  for (int i = self; i < rows * TOP_K * WIDTH; i += threads) {
    int pair = i / WIDTH;
    int place = (pair / TOP_K * EACH + pair % TOP_K) * WIDTH + i % WIDTH;
    float output = table[experts[pair]] < 0 ? 0.0f : outputs[place];
    out[pair * features + feature + i % WIDTH] = O(output);
  }
}

// x plus the sums of a row's outputs times amounts, in the order of ranks, the shared expert's last
// -> out O [rows, features]. outputs as above; without ROUTED only the shared expert's, and the others
// are in apart [rows, TOP_K, features].
template <typename O, int TOP_K, int EACH, int WIDTH, bool ROUTED, bool WITH_SHARED, typename X, typename P, typename A, typename Q>
HELPER void add_outputs(X x, P outputs, P amounts, A apart, int rows, int features, int feature, Q out, int self, int threads) {
  for (int i = self; i < rows * WIDTH; i += threads) {
    int row = i / WIDTH;
    int f = i % WIDTH;
    float sum = 0.0f;
    for (int k = 0; k < TOP_K; ++k) {
      float output = ROUTED ? outputs[(row * EACH + k) * WIDTH + f] : float(apart[(row * TOP_K + k) * features + feature + f]);
      sum = metal::fma(amounts[row * (TOP_K + 1) + k], output, sum);
    }
    if (WITH_SHARED) {
      float output = outputs[(row * EACH + EACH - 1) * WIDTH + f];
      sum = metal::fma(amounts[row * (TOP_K + 1) + TOP_K], output, sum);
    }
    out[row * features + feature + f] = O(float(x[row * features + feature + f]) + sum);
  }
}
