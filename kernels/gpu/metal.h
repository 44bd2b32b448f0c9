// What kernel bodies say and Metal does not: address spaces, which CUDA has no words for.
// One definition per line (see vocabulary.py).

// a function beside the bodies
#define HELPER inline
// an array in the memory of the threadgroup: SHARED(float, sums, 32);
#define SHARED(type, name, size) threadgroup type name[size]
// several elements at once, from a whole multiple of their size: LOAD(uint4, weights + 16 * i)
#define LOAD(type, pointer) (*reinterpret_cast<const device type*>(pointer))
#define STORE(type, pointer, value) (*reinterpret_cast<device type*>(pointer) = (value))
#define INF INFINITY
