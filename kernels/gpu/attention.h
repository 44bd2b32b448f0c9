// COUNT neighbouring values, loaded with as few loads as their size allows and widened later:
// Few<T, sizeof(T), COUNT> few; few.load(from); few.widen(to). `from` is a multiple of their size.

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
struct Few {
  T raw[COUNT];
  template <typename P>
  HELPER void load(P from) {
    for (int i = 0; i < COUNT; ++i) raw[i] = from[i];
  }
  template <typename F>
  HELPER void widen(F to) {
    for (int i = 0; i < COUNT; ++i) to[i] = float(raw[i]);
  }
};
template <typename T>
struct Few<T, 2, 2> {
  uint raw;
  template <typename P>
  HELPER void load(P from) { raw = LOAD(uint, from); }
  template <typename F>
  HELPER void widen(F to) { unpack<T>(raw, to); }
};
template <typename T>
struct Few<T, 2, 4> {
  uint2 raw;
  template <typename P>
  HELPER void load(P from) { raw = LOAD(uint2, from); }
  template <typename F>
  HELPER void widen(F to) {
    unpack<T>(raw.x, to);
    unpack<T>(raw.y, to + 2);
  }
};
template <typename T>
struct Few<T, 2, 8> {
  uint4 raw;
  template <typename P>
  HELPER void load(P from) { raw = LOAD(uint4, from); }
  template <typename F>
  HELPER void widen(F to) {
    unpack<T>(raw.x, to);
    unpack<T>(raw.y, to + 2);
    unpack<T>(raw.z, to + 4);
    unpack<T>(raw.w, to + 6);
  }
};
template <typename T>
struct Few<T, 4, 4> {
  float4 raw;
  template <typename P>
  HELPER void load(P from) { raw = LOAD(float4, from); }
  template <typename F>
  HELPER void widen(F to) {
    to[0] = raw.x;
    to[1] = raw.y;
    to[2] = raw.z;
    to[3] = raw.w;
  }
};
template <typename T>
struct Few<T, 4, 8> {
  Few<T, 4, 4> low;
  Few<T, 4, 4> high;
  template <typename P>
  HELPER void load(P from) {
    low.load(from);
    high.load(from + 4);
  }
  template <typename F>
  HELPER void widen(F to) {
    low.widen(to);
    high.widen(to + 4);
  }
};
