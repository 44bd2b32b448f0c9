// The sums over all lanes of COUNT values that each lane has, in values[0 .. COUNT - 1], which are
// overwritten; COUNT: a power of 2 up to 32. A lane gets the sum number sum_of_lane<COUNT>(lane).
// With LANES, a power of 2 from COUNT on, each run of so many lanes adds up its own.
// Over 32 lanes each sum has the bits of a simd_sum, with at most COUNT + 4 shuffles instead of
// 5 * COUNT. sum_of_lane is its own inverse: of a number below COUNT it is the first lane, of a run,
// that gets that sum.
template <int COUNT, int LANES = 32, typename P>
HELPER float simd_sums(P values, uint lane) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) {
    const int left = COUNT / (2 * step);  // of values, a constant: what is not unrolled is spilled
    // one lane of each pair goes on with the lower half of the values, the other with the upper
    bool upper = (lane & uint(step)) != 0;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      float own = upper ? values[i + left] : values[i];
      float other = upper ? values[i] : values[i + left];
      values[i] = own + simd_shuffle_xor(other, uint(step));
    }
    if (left == 0) {
      values[0] = values[0] + simd_shuffle_xor(values[0], uint(step));
    }
  }
  return values[0];
}

template <int COUNT>
HELPER int sum_of_lane(uint lane) {
  int index = 0;
#pragma unroll
  for (int step = 1; step < COUNT; step *= 2) {
    index += (lane & uint(step)) != 0 ? COUNT / (2 * step) : 0;
  }
  return index;
}
