// Rows of several arrays side by side: out[r] = part 0 [rows[r]], part 1 [rows[r]], ...; PARTS of them.
// rows int [n]; parts T [*, width] -> out T [n, PARTS * width]
// grid (width rounded up to 64, PARTS, n), threadgroup (64, 1, 1)
const uint width = part0_shape[1];
const uint column = thread_position_in_grid.x;
const uint which = threadgroup_position_in_grid.y;
const uint row = threadgroup_position_in_grid.z;
if (column < width) {
  auto part = which < 4 ? which < 2 ? which == 0 ? part0 : part1 : which == 2 ? part2 : part3
      : which < 6 ? which == 4 ? part4 : part5 : which == 6 ? part6 : part7;
  out[(row * PARTS + which) * width + column] = part[ulong(rows[row]) * width + column];
}
