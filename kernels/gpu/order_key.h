// Larger for larger values; equal for -0 and 0; largest for NaN; never 0.
HELPER uint order_key(float value) {
  uint bits = as_type<uint>(value == 0.0f ? 0.0f : value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return 0xffffffffu;
  }
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
