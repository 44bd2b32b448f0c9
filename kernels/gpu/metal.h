// What kernel bodies say and Metal does not: address spaces, which CUDA has no words for.
// One definition per line (see vocabulary.py).

// a function beside the bodies
#define HELPER inline
// an array in the memory of the threadgroup: SHARED(float, sums, 32);
#define SHARED(type, name, size) threadgroup type name[size]
// several elements at once, from a whole multiple of their size: LOAD(uint4, weights + 16 * i)
#define LOAD(type, pointer) (*reinterpret_cast<const device type*>(pointer))
#define STORE(type, pointer, value) (*reinterpret_cast<device type*>(pointer) = (value))
// an input that the kernel writes into: auto to = WRITABLE(T, keys) + place;
#define WRITABLE(type, pointer) (const_cast<device type*>(pointer))
// the floats of SHARED(float4, fours, 32), one by one
#define FLOATS(array) (reinterpret_cast<threadgroup float*>(array))
#define INF INFINITY

// matrix units: 16 x 16 weights with 16 x 8 values of x, in pairs of 16 bits. A lane has two values
// side by side of a matrix of 8 x 8; of x it gets its two rows' values of one input.
// Halves of two pairs make a new one; a pair's first value is its lower half.
HELPER int tile_row(uint lane) { return int((lane & 16u) / 4u + (lane & 6u) / 2u); }
HELPER int tile_quarter(uint lane) { return int((lane & 8u) / 4u + (lane & 1u)); }
HELPER ushort tile_lane(int row, int quarter) { return ushort((row & 4) * 4 + (row & 3) * 2 + (quarter & 2) * 4 + (quarter & 1)); }
HELPER uint lower_halves(uint a, uint b) { return (a & 0xffffu) | (b << 16); }
HELPER uint upper_halves(uint a, uint b) { return (a >> 16) | (b & 0xffff0000u); }
HELPER uint tile_input(uint pair, uint lane) { int own = tile_row(lane); int row = 2 * tile_quarter(lane); uint a = simd_shuffle(pair, tile_lane(row, own / 2)); uint b = simd_shuffle(pair, tile_lane(row + 1, own / 2)); return own % 2 ? upper_halves(a, b) : lower_halves(a, b); }
template <typename T> HELPER uint pair_product(uint a, uint b) { float x = float(as_type<T>(ushort(a))) * float(as_type<T>(ushort(b))); float y = float(as_type<T>(ushort(a >> 16))) * float(as_type<T>(ushort(b >> 16))); return uint(as_type<ushort>(T(x))) | uint(as_type<ushort>(T(y))) << 16; }
template <typename T, typename P> HELPER void tile_add(P sums, uint a, uint b) { simdgroup_matrix<T, 8, 8> w; simdgroup_matrix<T, 8, 8> x; simdgroup_matrix<float, 8, 8> y; reinterpret_cast<thread uint&>(w.thread_elements()) = a; reinterpret_cast<thread uint&>(x.thread_elements()) = b; reinterpret_cast<thread float2&>(y.thread_elements()) = float2(sums[0], sums[1]); simdgroup_multiply_accumulate(y, w, x, y); float2 added = reinterpret_cast<thread float2&>(y.thread_elements()); sums[0] = added.x; sums[1] = added.y; }
template <typename T, typename P> HELPER void tile_multiply(P sums, uint a, uint b, uint c, uint d, uint x, uint y) { tile_add<T>(sums, a, x); tile_add<T>(sums, c, y); tile_add<T>(sums + 2, b, x); tile_add<T>(sums + 2, d, y); }
