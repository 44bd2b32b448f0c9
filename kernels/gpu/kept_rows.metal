// An accepted path's keys and values moved directly behind the committed ones, in the buffers they
// stand in, of up to LAYERS layers. A thread has one element of the rows of one head.
// path int [..]: how many rows, then which, each above the one before; tree int [rows, *], as
// attention.py says: column 1 is the place of row 0; keys0, values0, keys1, .. T [kv_heads, capacity, DIM], written into; order: not
// read
// -> done T [8], left as it is
// grid (DIM, 2 * kv_heads, layers), threadgroup (DIM, 1, 1)
const uint me = thread_position_in_threadgroup.x;
const uint half = threadgroup_position_in_grid.y % 2;
const uint head = threadgroup_position_in_grid.y / 2;
const uint layer = threadgroup_position_in_grid.z;
auto buffer = keys0;
if (layer == 0) buffer = half == 0 ? keys0 : values0;
if (layer == 1) buffer = half == 0 ? keys1 : values1;
if (layer == 2) buffer = half == 0 ? keys2 : values2;
if (layer == 3) buffer = half == 0 ? keys3 : values3;
if (layer == 4) buffer = half == 0 ? keys4 : values4;
if (layer == 5) buffer = half == 0 ? keys5 : values5;
if (layer == 6) buffer = half == 0 ? keys6 : values6;
if (layer == 7) buffer = half == 0 ? keys7 : values7;
auto to = WRITABLE(T, buffer) + (ulong(head) * keys0_shape[1] + uint(tree[1])) * DIM + me;
// Row path[1 + i] is row i of the path or stands behind it, so what is written was read before. Loads
// by the batch: none waits for another.
for (int first = 0; first < path[0]; first += 8) {
  T batch[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    batch[i] = to[path[1 + metal::min(first + i, path[0] - 1)] * DIM];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i < path[0]) to[(first + i) * DIM] = batch[i];
  }
}
