// The TOP_K largest logits of each row, their weights, and the union of all rows' experts, by one
// threadgroup: a simdgroup per row in turn, then a thread per expert. After order_key.h.
// logits T [rows, columns], of which the columns START .. START + EXPERTS count ->
// experts int [rows, TOP_K] by falling logit, weights float [rows, TOP_K],
// used int [min(rows * TOP_K, EXPERTS), 2]: expert, mask of its rows; ascending, then (-1, 0)
// taken: ushort [32 * 32], counts: int [16], of threadgroup memory
template <int EXPERTS, int TOP_K, int START, bool NORMALIZE, typename L, typename E, typename W, typename U, typename P, typename Q>
HELPER void route_rows(L logits, int rows, int columns, E experts, W weights, U used, P taken, Q counts, int self, int simdgroups) {
  const int PER_LANE = (EXPERTS + 31) / 32;  // expert i * 32 + lane is the i-th of a lane
  int lane = self % 32;
  int simdgroup = self / 32;

  for (int row = simdgroup; row < rows; row += simdgroups) {
    auto values = logits + row * columns + START;
    float own[PER_LANE];
    uint keys[PER_LANE];  // 0: not there, or chosen already
    for (int i = 0; i < PER_LANE; ++i) {
      int expert = 32 * i + lane;
      own[i] = expert < EXPERTS ? float(values[expert]) : -INF;
      keys[i] = expert < EXPERTS ? order_key(own[i]) : 0u;
    }
    uint bits = 0;
    float mine = 0.0f;  // lane k: the k-th largest logit, and whose it is
    int chosen = 0;
    for (int k = 0; k < TOP_K; ++k) {
      uint best = 0;
      int at = 0;
      float value = 0.0f;
      for (int i = 0; i < PER_LANE; ++i) {
        bool more = keys[i] > best;  // not of equals: the lower expert came first
        best = more ? keys[i] : best;
        at = more ? i : at;
        value = more ? own[i] : value;
      }
      uint largest = simd_max(best);
      int winner = simd_min(best == largest ? 32 * at + lane : EXPERTS);
      float won = simd_shuffle(value, uint(winner) % 32u);
      if (winner % 32 == lane) {
        bits |= 1u << (winner / 32);
      }
      for (int i = 0; i < PER_LANE; ++i) {
        keys[i] = winner == 32 * i + lane ? 0u : keys[i];
      }
      mine = lane == k ? won : mine;
      chosen = lane == k ? winner : chosen;
    }
    taken[32 * row + lane] = ushort(bits);  // bit i: the lane's i-th
    float peak = simd_shuffle(mine, 0);
    float power = lane < TOP_K ? metal::exp(mine - peak) : 0.0f;
    float sum = power;
    if (!NORMALIZE) {
      sum = 0.0f;
      for (int i = 0; i < PER_LANE; ++i) {
        sum += 32 * i + lane < EXPERTS ? metal::exp(own[i] - peak) : 0.0f;
      }
    }
    sum = simd_sum(sum);
    if (lane < TOP_K) {
      experts[row * TOP_K + lane] = chosen;
      weights[row * TOP_K + lane] = power / sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // at least as many threads as experts
  int expert = self;
  uint mask = 0;
  if (expert < EXPERTS) {
    for (int row = 0; row < rows; ++row) {
      mask |= ((uint(taken[32 * row + expert % 32]) >> (expert / 32)) & 1u) << row;
    }
  }
  int before = simd_prefix_exclusive_sum(mask != 0 ? 1 : 0);
  if (lane == 31) {
    counts[simdgroup] = before + (mask != 0 ? 1 : 0);  // experts in use
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int total = 0;
  for (int i = 0; i < simdgroups; ++i) {
    before += i < simdgroup ? counts[i] : 0;
    total += counts[i];
  }
  if (mask != 0) {
    used[2 * before] = expert;
    used[2 * before + 1] = int(mask);
  }
  int entries = metal::min(rows * TOP_K, EXPERTS);
  for (int i = total + expert; i < entries; i += 32 * simdgroups) {
    used[2 * i] = -1;
    used[2 * i + 1] = 0;
  }
}
