// COUNT neighbouring values as float, with as few loads as their size allows:
// Values<T, sizeof(T), COUNT>::load(from, to). `from` is a multiple of the size of all of them.

// the two values of 2 bytes in a word; those of bfloat are floats without their lower half
template <typename T>
struct Pair {
  HELPER static float first(uint word) { return float(as_type<T>(ushort(word))); }
  HELPER static float second(uint word) { return float(as_type<T>(ushort(word >> 16))); }
};
template <>
struct Pair<bfloat> {
  HELPER static float first(uint word) { return as_type<float>(word << 16); }
  HELPER static float second(uint word) { return as_type<float>(word & 0xffff0000u); }
};
template <typename T, typename F>
HELPER void unpack(uint word, F to) {
  to[0] = Pair<T>::first(word);
  to[1] = Pair<T>::second(word);
}

template <typename T, int SIZE, int COUNT>
struct Values {
  template <typename P, typename F>
  HELPER static void load(P from, F to) {
    for (int i = 0; i < COUNT; ++i) to[i] = float(from[i]);
  }
};
template <typename T>
struct Values<T, 2, 2> {
  template <typename P, typename F>
  HELPER static void load(P from, F to) { unpack<T>(LOAD(uint, from), to); }
};
template <typename T>
struct Values<T, 2, 4> {
  template <typename P, typename F>
  HELPER static void load(P from, F to) {
    auto words = LOAD(uint2, from);
    unpack<T>(words.x, to);
    unpack<T>(words.y, to + 2);
  }
};
template <typename T>
struct Values<T, 2, 8> {
  template <typename P, typename F>
  HELPER static void load(P from, F to) {
    auto words = LOAD(uint4, from);
    unpack<T>(words.x, to);
    unpack<T>(words.y, to + 2);
    unpack<T>(words.z, to + 4);
    unpack<T>(words.w, to + 6);
  }
};
template <typename T>
struct Values<T, 4, 4> {
  template <typename P, typename F>
  HELPER static void load(P from, F to) {
    auto four = LOAD(float4, from);
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
  }
};
template <typename T>
struct Values<T, 4, 8> {
  template <typename P, typename F>
  HELPER static void load(P from, F to) {
    Values<T, 4, 4>::load(from, to);
    Values<T, 4, 4>::load(from + 4, to + 4);
  }
};
