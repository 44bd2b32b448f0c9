// Attention of one row to one block of 128 positions, for G heads that share keys and values: what
// each block contributes, not yet divided. A simdgroup takes 32 positions; a lane has four of their
// keys by quarters for the scores, and DIM / 32 dimensions of all of them for the values.
// queries T [heads, rows, DIM]; keys, values T [kv_heads, capacity, DIM]; scale float [1];
// tree int32 [rows, *]: the row's position, the committed length, then the rows of its path
// -> parts float [heads, rows, blocks, DIM]: at 32 * i + lane the sum of dimension lane * DIM / 32 + i;
//    totals float [heads, rows, blocks, 2]: the largest score and the sum of the weights
// Blocks behind the row's position are left as they are. If WINDOW the row sees no position before
// tree[2], and blocks that end before it are left as well.
// grid (128 * blocks, heads / G, rows), threadgroup (128, 1, 1)
// Few threads wait for much memory, so loads are issued by the batch: the barriers behind them order
// nothing, but keep the compiler from putting each load next to its use.
constexpr uint PER = DIM / 32;
constexpr bool SMALL = G <= 2 && sizeof(T) == 2;  // registers for twice as many
constexpr uint STEP = SMALL && PER % 4 == 0 ? 4 : PER % 2 == 0 ? 2 : 1;
constexpr uint BATCH = SMALL ? 16 : 8;
SHARED(float4, query, G * DIM / 4);
SHARED(float, spread, 2 * 4 * DIM);
SHARED(float, peaks, 4 * G);
SHARED(float, sums, 4 * G);
SHARED(float, factors, 4 * G);
const uint lane = thread_index_in_simdgroup;
const uint run = simdgroup_index_in_threadgroup;
const uint me = thread_index_in_threadgroup;
const uint block = threadgroup_position_in_grid.x;
const uint blocks = threadgroups_per_grid.x;
const uint head = threadgroup_position_in_grid.y * G;
const uint row = threadgroup_position_in_grid.z;
const uint rows = queries_shape[1];
auto mine = tree + row * tree_shape[1];
const uint last = mine[0], length = mine[1];
const uint least = WINDOW ? uint(mine[2]) : 0;
if (128 * block > last || 128 * block + 128 <= least) return;  // the whole threadgroup

for (uint i = me; i < G * DIM / 4; i += 128) {
  const uint g = i / (DIM / 4);
  float four[4];
  Few<T, sizeof(T), 4> few;
  few.load(queries + ((head + g) * rows + row) * DIM + i % (DIM / 4) * 4);
  few.widen(four);
  query[i].x = four[0] * scale[0];
  query[i].y = four[1] * scale[0];
  query[i].z = four[2] * scale[0];
  query[i].w = four[3] * scale[0];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Behind the row's own key it is read again, and weighs nothing: no branch, which would part the
// loads from each other. A run without any key has -INF for its largest score, and 0 for all else.
const uint first = 128 * block + 32 * run;
const uint quarter = lane % 4, eighth = lane / 4;
const uint kv_head = head / (queries_shape[0] / keys_shape[0]);
const ulong start = ulong(kv_head) * keys_shape[1] * DIM;
uint places[4];  // of keys first + 8 * k + eighth
for (uint k = 0; k < 4; ++k) {
  const uint position = metal::min(first + 8 * k + eighth, last);
  places[k] = position < length ? position : length + uint(mine[2 + position - length]);
}
float scores[4 * G];
for (uint i = 0; i < 4 * G; ++i) scores[i] = 0.0f;
auto from = keys + start + 8 * quarter;
#pragma unroll 1
for (uint c = 0; c < PER; c += STEP) {
  Few<T, sizeof(T), 8> batch[4 * STEP];
#pragma unroll
  for (uint i = 0; i < 4 * STEP; ++i) {
    batch[i].load(from + places[i % 4] * DIM + 32 * (c + i / 4));
  }
  simdgroup_barrier(mem_flags::mem_none);
#pragma unroll
  for (uint step = 0; step < STEP; ++step) {
    float key[32];
    for (uint k = 0; k < 4; ++k) batch[4 * step + k].widen(key + 8 * k);
    for (uint g = 0; g < G; ++g) {
      const uint at = (g * DIM + 32 * (c + step) + 8 * quarter) / 4;
      const float4 a = query[at], b = query[at + 1];
      for (uint k = 0; k < 4; ++k) {
        float score = scores[4 * g + k];
        score = metal::fma(a.x, key[8 * k], score);
        score = metal::fma(a.y, key[8 * k + 1], score);
        score = metal::fma(a.z, key[8 * k + 2], score);
        score = metal::fma(a.w, key[8 * k + 3], score);
        score = metal::fma(b.x, key[8 * k + 4], score);
        score = metal::fma(b.y, key[8 * k + 5], score);
        score = metal::fma(b.z, key[8 * k + 6], score);
        scores[4 * g + k] = metal::fma(b.w, key[8 * k + 7], score);
      }
    }
  }
}

// The quarters of a score are added so that a lane has that of one key: 8 * quarter + eighth.
const bool odd = quarter % 2 == 1, high = quarter >= 2;
const uint own = first + 8 * quarter + eighth;
const bool seen = own <= last && own >= least;
float weights[G];
for (uint g = 0; g < G; ++g) {
  const float s0 = scores[4 * g], s1 = scores[4 * g + 1];
  const float s2 = scores[4 * g + 2], s3 = scores[4 * g + 3];
  const float low_pair = (odd ? s1 : s0) + simd_shuffle_xor(odd ? s0 : s1, 1);
  const float high_pair = (odd ? s3 : s2) + simd_shuffle_xor(odd ? s2 : s3, 1);
  const float other = simd_shuffle_xor(high ? low_pair : high_pair, 2);
  const float score = (high ? high_pair : low_pair) + other;
  const float peak = simd_max(seen ? score : -INF);
  weights[g] = seen ? metal::exp(score - peak) : 0.0f;
  const float sum = simd_sum(weights[g]);
  if (lane == 0) {
    peaks[run * G + g] = peak;
    sums[run * G + g] = sum;
  }
}

const uint place = high ? (odd ? places[3] : places[2]) : (odd ? places[1] : places[0]);
auto dims = values + start + lane * PER;
float out[G * PER];
for (uint i = 0; i < G * PER; ++i) out[i] = 0.0f;
#pragma unroll 1
for (uint j = 0; j < 32; j += BATCH) {
  Few<T, sizeof(T), PER> batch[BATCH];
#pragma unroll
  for (uint i = 0; i < BATCH; ++i) {
    const uint holder = (j + i) % 8 * 4 + (j + i) / 8;
    batch[i].load(dims + simd_shuffle(place, holder) * DIM);
  }
  simdgroup_barrier(mem_flags::mem_none);
#pragma unroll
  for (uint i = 0; i < BATCH; ++i) {
    const uint holder = (j + i) % 8 * 4 + (j + i) / 8;
    float value[PER];
    batch[i].widen(value);
    for (uint g = 0; g < G; ++g) {
      const float weight = simd_shuffle(weights[g], holder);
      for (uint d = 0; d < PER; ++d) {
        out[g * PER + d] = metal::fma(weight, value[d], out[g * PER + d]);
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// The runs are rescaled to the largest score of the block, a simdgroup for each head...
for (uint g = run; g < G; g += 4) {
  const float reached = lane < 4 ? peaks[lane * G + g] : -INF;
  const float peak = simd_max(reached);
  const float factor = lane < 4 ? metal::exp(reached - peak) : 0.0f;
  const float sum = simd_sum(lane < 4 ? sums[lane * G + g] * factor : 0.0f);
  if (lane < 4) factors[lane * G + g] = factor;
  if (lane == 0) {
    const uint to = 2 * (((head + g) * rows + row) * blocks + block);
    totals[to] = peak;
    totals[to + 1] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// ... and added in order. Two halves of `spread` take turns: one barrier a head is enough.
#pragma unroll
for (uint g = 0; g < G; ++g) {
  auto all = spread + g % 2 * (4 * DIM);
  for (uint i = 0; i < PER; ++i) {
    all[run * DIM + 32 * i + lane] = out[g * PER + i] * factors[run * G + g];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = me; i < DIM; i += 128) {
    float sum = all[i];
    for (uint s = 1; s < 4; ++s) sum = sum + all[s * DIM + i];
    parts[(((head + g) * rows + row) * blocks + block) * DIM + i] = sum;
  }
}
