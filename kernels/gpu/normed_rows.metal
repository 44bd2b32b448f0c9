// The normed rows (normed.h) of x T [rows, in], a threadgroup for each -> normed uint
// [rows, normed_words(in)]
SHARED(float, parts, 128);
int row = int(threadgroup_position_in_grid.x);
int in = x_shape[1];
norm_row<T>(x + row * in, norm, eps[0], in, normed + row * normed_words(in), parts, int(thread_index_in_threadgroup), int(simdgroups_per_threadgroup));
