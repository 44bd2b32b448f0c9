// The greedy walk down a verified tree, put into what a draft is asked next.
// verdict int [rows, 2]: the most probable token after each row first; tree int [2 * rows or more]:
// tokens, parents; asked int [COUNT + 1 or more], its last: the numbers of a draft's pass after which
// no row was told (specdec/draft/graph.py), and the committed length before the walk
// -> numbers int [COUNT], the rows of the path told; came int [36 + the sizes of verdict and tree], as
//    kernels.walked says
// grid (128, 1, 1), threadgroup (128, 1, 1)
SHARED(int, path, 32);
SHARED(int, found, 2);
const int me = int(thread_index_in_threadgroup);
const int rows = verdict_shape[0];
if (me == 0) {
  int last = 0, length = 1, bonus = verdict[0];
  path[0] = 0;
  for (int row = 1; row < rows; ++row) {
    if (tree[rows + row] == last && tree[row] == bonus) {
      path[length] = row;
      length = length + 1;
      last = row;
      bonus = verdict[2 * row];
    }
  }
  found[0] = length;
  found[1] = bonus;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const int length = found[0];
if (me < 36) {
  int value = me > 0 && me <= length ? path[me - 1] : 0;
  value = me == 0 ? length : me == 33 ? found[1] : value;
  came[me] = me == 34 ? asked[asked_shape[0] - 1] + length : value;
}
for (int i = me; i < 2 * rows; i += 128) came[36 + i] = verdict[i];
for (int i = me; i < tree_shape[0]; i += 128) came[36 + 2 * rows + i] = tree[i];
constexpr int COUNT = 1 + LAYERS + 2 * BLOCK + 4 * BLOCK * LAYERS;
auto from = asked + (asked_shape[0] - 1 - COUNT);
for (int i = me; i < COUNT; i += 128) {
  int value = from[i];
  const int told = i - 1 - LAYERS;
  const int id = told - BLOCK;
  const int seen = id - BLOCK;
  if (i == 0) value = length;
  if (told >= 0 && told < BLOCK) value = told < length ? path[told] : 0;
  if (id == 0) value = found[1];
  if (seen >= 0 && seen % 4 < 3) value = metal::max(value + length, 0);
  numbers[i] = value;
}
