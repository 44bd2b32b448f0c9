// Routing by one threadgroup: route.h, which says what the arrays are.
SHARED(ushort, taken, 32 * 32);
SHARED(int, counts, 16);
route_rows<EXPERTS, TOP_K, START, NORMALIZE>(logits, logits_shape[0], logits_shape[1], experts, weights, used, taken, counts, int(thread_index_in_threadgroup), int(simdgroups_per_threadgroup));
