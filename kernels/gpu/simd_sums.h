// The sums over all lanes of COUNT values that each lane has, in values[0 .. COUNT - 1], which are
// overwritten; COUNT: a power of 2 up to 32. A lane gets the sum number sum_of_lane<COUNT>(lane).
// Each sum has the bits of a simd_sum, with COUNT + 4 shuffles instead of 5 * COUNT.
template <int COUNT, typename P>
HELPER float simd_sums(P values, uint lane) {
  int left = COUNT;
#pragma unroll
  for (uint step = 1; step < 32; step *= 2) {
    left = left / 2;
    if (left == 0) {
      values[0] = values[0] + simd_shuffle_xor(values[0], step);
      continue;
    }
    // one lane of each pair goes on with the lower half of the values, the other with the upper
    bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      float own = upper ? values[i + left] : values[i];
      float other = upper ? values[i] : values[i + left];
      values[i] = own + simd_shuffle_xor(other, step);
    }
  }
  return values[0];
}

template <int COUNT>
HELPER int sum_of_lane(uint lane) {
  int index = 0;
#pragma unroll
  for (int left = COUNT / 2; left > 0; left /= 2) {
    index += (lane & 1) != 0 ? left : 0;
    lane /= 2;
  }
  return index;
}
