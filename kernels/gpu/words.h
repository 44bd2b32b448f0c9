// Words of 32 bits, as many at once as COUNT allows: data .. + COUNT -> words, from a whole multiple of
// 16 bytes on if COUNT is a multiple of 4, of 8 if it is 2. Elements of data may be smaller.
template <int COUNT, typename D, typename P>
HELPER void load_words(D data, P words) {
  const int each = int(sizeof(uint) / sizeof(*data));
  if (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i + 3 < COUNT; i += 4) {
      auto four = LOAD(uint4, data + i * each);
      words[i] = four.x;
      words[i + 1] = four.y;
      words[i + 2] = four.z;
      words[i + 3] = four.w;
    }
  } else if (COUNT == 2) {
    auto two = LOAD(uint2, data);
    words[0] = two.x;
    words[COUNT - 1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      words[i] = LOAD(uint, data + i * each);
    }
  }
}
