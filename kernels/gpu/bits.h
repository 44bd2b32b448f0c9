// Masks of rows: bit r is row r.

HELPER int lowest_bit(uint mask) {
  return int(metal::popcount((mask & (0u - mask)) - 1u));
}

// the mask without its `count` lowest rows
HELPER uint without_lowest(uint mask, int count) {
  for (int i = 0; i < count; ++i) {
    mask &= mask - 1u;
  }
  return mask;
}
