// of attention_inputs.metal, block_inputs.metal and those that write in place

// One head of one row by a simdgroup: normalized, and its first 2 * half elements turned by the cosines
// and sines from `angle` on -> to T [DIM]. The other one of each pair is read again, not fetched from
// the lane that has it: pairs may be any distance apart.
template <typename T, int DIM, typename F, typename W, typename A, typename O>
HELPER void normalize_and_turn(F from, W weight, float eps, A turn_cos, A turn_sin, uint angle, uint half_turned, O to, uint lane) {
  constexpr uint PER = DIM / 32;
  float own[PER];
  float other[PER];
  float squares = 0.0f;
  for (uint j = 0; j < PER; ++j) {
    const uint i = lane + 32 * j;
    const uint pair = i < half_turned ? i + half_turned : i < 2 * half_turned ? i - half_turned : i;
    own[j] = float(from[i]);
    other[j] = float(from[pair]) * float(weight[pair]);
    squares = metal::fma(own[j], own[j], squares);
  }
  const float scale = metal::rsqrt(simd_sum(squares) / float(DIM) + eps);
  for (uint j = 0; j < PER; ++j) {
    const uint i = lane + 32 * j;
    float result = own[j] * float(weight[i]) * scale;
    if (i < 2 * half_turned) {
      const uint at = angle + (i < half_turned ? i : i - half_turned);
      const float turned = other[j] * scale * float(turn_sin[at]);
      result = metal::fma(result, float(turn_cos[at]), i < half_turned ? -turned : turned);
    }
    to[i] = T(result);
  }
}
