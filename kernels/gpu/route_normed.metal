// Routing (route.h) by the first threadgroup, and at the same time, by the others, the normed rows
// (normed.h) of x T [rows, in] -> normed uint [rows, normed_words(in)]
SHARED(ushort, taken, 32 * 32);
SHARED(int, counts, 16);
SHARED(float, parts, 128);
int self = int(thread_index_in_threadgroup);
int simdgroups = int(simdgroups_per_threadgroup);
int row = int(threadgroup_position_in_grid.x) - 1;
if (row < 0) {
  route_rows<EXPERTS, TOP_K, START, NORMALIZE>(logits, logits_shape[0], logits_shape[1], experts, weights, used, taken, counts, self, simdgroups);
} else {
  int in = x_shape[1];
  norm_row<T>(x + row * in, norm, eps[0], in, normed + row * normed_words(in), parts, self, simdgroups);
}
