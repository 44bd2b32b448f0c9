// The WIDTH best of the candidates that all threads of a threadgroup hold together, VALUES each:
// by falling value, among equals by rising id. After order_key.h.
//
//   uint keys[VALUES];                // order_key of each value, 0: there is none; overwritten
//   float values[VALUES];  int ids[VALUES];   // ids are distinct
//   SHARED(uint, best_keys, 32);  SHARED(int, best_ids, 32);
//   top_of<VALUES, WIDTH>(keys, values, ids, best_keys, best_ids, to, lane, simdgroup, simdgroups);
//
// -> to[0 .. WIDTH - 1]: ids, -1 for none; to[WIDTH .. 2 * WIDTH - 1]: the bits of their values.
// All threads are to come; begins and ends with threads that may read and write the shared arrays.
template <int VALUES, int WIDTH, typename K, typename V, typename I, typename S, typename N, typename O>
HELPER void top_of(K keys, V values, I ids, S best_keys, N best_ids, O to, uint lane, uint simdgroup, uint simdgroups) {
  const int none = 0x7fffffff;
#pragma unroll 1
  for (int k = 0; k < WIDTH; ++k) {
    uint key = 0;
    int id = none;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      bool more = keys[i] > key || (keys[i] == key && key != 0 && ids[i] < id);
      key = more ? keys[i] : key;
      id = more ? ids[i] : id;
    }
    uint largest = simd_max(key);
    int first = simd_min(key == largest && key != 0 ? id : none);
    if (lane == 0) {
      best_keys[simdgroup] = largest;
      best_ids[simdgroup] = first;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint theirs = lane < simdgroups ? best_keys[lane] : 0u;
    int their_id = lane < simdgroups ? best_ids[lane] : none;
    uint winner = simd_max(theirs);
    int chosen = simd_min(theirs == winner ? their_id : none);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      if (winner != 0 && keys[i] == winner && ids[i] == chosen) {
        to[k] = chosen;
        to[WIDTH + k] = as_type<int>(values[i]);
        keys[i] = 0;
      }
    }
    if (winner == 0 && lane == 0 && simdgroup == 0) {
      to[k] = -1;
      to[WIDTH + k] = as_type<int>(-INF);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
