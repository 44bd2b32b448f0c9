// The mixer of a gated delta layer over a tree, one threadgroup of VALUE_DIM / VALUES simdgroups
// per value head. Rows are taken CHUNK at a time in the order of `program`: convolution, gates and the
// norms of queries and keys, the recurrence, each simdgroup with VALUES rows of the state in
// registers, and the output norm. A row's operations are the same in every tree, wherever it stands.
//
// qkv, z, b, a T [rows, ...]: pieces that begin at columns starts[0..3], of `channels` (queries, keys,
// values), heads * VALUE_DIM, heads and heads columns. conv_weight T [TAPS, channels]; a_log, dt_bias
// float [heads]; norm_weight T [VALUE_DIM]; eps float [1]; conv T [TAPS - 1, channels], committed;
// state float [heads, VALUE_DIM, KEY_DIM], committed. heads / REPEATS key heads.
// program int [1 + rows * (4 + TAPS)]: the number of rows, and for each step its row, the slot with
// the state it begins with (-1: the state at hand), the slot to keep its state in or -1, whether
// nothing follows it, and its window.
// -> y T [rows, heads * VALUE_DIM], and if SINGLE, after the only row,
// record R = T [TAPS - 1, channels] and states float [heads, VALUE_DIM, KEY_DIM]; else the tape,
// record R = float [rows, delta [heads, VALUE_DIM] + keys [key heads, KEY_DIM] + decay [heads] +
// channels before the convolution], and room for states float [slots, heads, VALUE_DIM, KEY_DIM].
//
// Slots lie in device memory: the state of a head (64 KB at 128 x 128) is larger than threadgroup
// memory, and a second one in registers would leave too few. Few trees need one.
//
// A head's rows are one threadgroup's work, so its instructions and its waiting are what counts. Few
// simdgroups with much state each: what a row costs beside its sums is paid by each of them. LANES
// lanes share a row of the state: fewer take fewer shuffles and read more keys. What comes from far is
// asked for at once.
constexpr int SIMDGROUPS = VALUE_DIM / VALUES;
constexpr int CHUNK = SINGLE ? 1 : SIMDGROUPS;
constexpr int LANES = 8;
constexpr int OWN = VALUES * LANES / 32;  // rows of the state that a lane has a part of
constexpr int FOURS = (KEY_DIM + 4 * LANES - 1) / (4 * LANES);  // and of each so many four columns
constexpr int EACH = 4 * FOURS;
// Of a row in threadgroup memory, in blocks of 32: query, key, values (later y).
constexpr int KEY_BLOCKS = (KEY_DIM + 31) / 32;
constexpr int VALUE_BLOCKS = (VALUE_DIM + 31) / 32;
constexpr int KEYS = 32 * KEY_BLOCKS;
constexpr int VALUES_AT = 2 * KEYS;
constexpr int ROW = VALUES_AT + 32 * VALUE_BLOCKS;
SHARED(float4, fours, CHUNK * ROW / 4);
SHARED(float4, factors, CHUNK);  // decay, beta, key times query
SHARED(int4, marks, CHUNK);      // the first four numbers of a step
auto staged = FLOATS(fours);
uint lane = thread_index_in_simdgroup;
int simdgroup = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.x;
uint heads = threadgroups_per_grid.x;
uint key_columns = heads / REPEATS * KEY_DIM;
uint value_columns = heads * VALUE_DIM;
uint channels = 2 * key_columns + value_columns;
uint record_width = value_columns + key_columns + heads + channels;
uint key_from = head / REPEATS * KEY_DIM;
uint value_from = 2 * key_columns + head * VALUE_DIM;
bool keeps = head % REPEATS == 0;  // one value head of those that share a key head
uint within = lane % LANES;
uint mine = simdgroup * VALUES + lane / LANES * OWN;  // the first of OWN rows of the state
uint state_size = heads * VALUE_DIM * KEY_DIM;
uint state_at = (head * VALUE_DIM + mine) * KEY_DIM;
int steps = SINGLE ? 1 : qkv_shape[0];  // program[0] would have to be waited for

// Of a chunk a simdgroup prepares the query and key of one row, values and gates of another, which it
// also finishes.
int own = simdgroup;
int other = (simdgroup + SIMDGROUPS / 2) % SIMDGROUPS;
T key_seen[2 * KEY_BLOCKS * TAPS];
T value_seen[VALUE_BLOCKS * TAPS];
T gate[VALUE_BLOCKS];
T rates[2];
float norm[VALUE_BLOCKS];
float epsilon = eps[0];
float rate = a_log[head];
float bias = dt_bias[head];
#pragma unroll
for (int j = 0; j < VALUE_BLOCKS; ++j) {
  int value = 32 * j + int(lane);
  norm[j] = float(norm_weight[value < VALUE_DIM ? value : 0]);
}
float s[OWN * EACH];

for (int first = 0; first < steps; first += CHUNK) {
  int count = SINGLE ? 1 : metal::min(CHUNK, steps - first);
  auto chunk = program + 1 + first * (4 + TAPS);
  auto own_step = chunk + metal::min(own, count - 1) * (4 + TAPS);
  auto other_step = chunk + metal::min(other, count - 1) * (4 + TAPS);
  uint own_row = SINGLE ? 0 : own_step[0];
  uint other_row = SINGLE ? 0 : other_step[0];
  if (own < count) {
    delta_look<KEY_DIM, 2, TAPS, SINGLE>(key_seen, qkv + starts[0] + key_from, qkv_shape[1],
                                         conv + key_from, channels, key_columns, own_step + 4, lane);
  }
  if (other < count) {
    auto from = z + other_row * z_shape[1] + starts[1] + head * VALUE_DIM;
#pragma unroll
    for (int j = 0; j < VALUE_BLOCKS; ++j) {
      int value = 32 * j + int(lane);
      gate[j] = from[value < VALUE_DIM ? value : 0];
    }
    rates[0] = a[other_row * a_shape[1] + starts[3] + head];
    rates[1] = b[other_row * b_shape[1] + starts[2] + head];
    delta_look<VALUE_DIM, 1, TAPS, SINGLE>(value_seen, qkv + starts[0] + value_from, qkv_shape[1],
                                           conv + value_from, channels, 0, other_step + 4, lane);
  }
  simdgroup_barrier(mem_flags::mem_none);  // all loads before the first wait, the state's behind
  if (first == 0) {
    delta_load_fours<OWN, KEY_DIM, LANES>(s, state + state_at, within);
    simdgroup_barrier(mem_flags::mem_none);
  }
  if (own < count) {
    auto tape = record + own_row * record_width;
    auto before = tape + (SINGLE ? 0 : record_width - channels);
    float mixed[2 * KEY_BLOCKS];
    delta_convolve<KEY_DIM, 2, TAPS, SINGLE, R>(mixed, key_seen, conv_weight + key_from, channels,
                                                key_columns, before + key_from, keeps, lane);
    float sums[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      sums[n] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      float query = mixed[j];
      float key = mixed[KEY_BLOCKS + j];
      sums[0] = metal::fma(query, query, sums[0]);
      sums[1] = metal::fma(key, key, sums[1]);
      sums[2] = metal::fma(query, key, sums[2]);
    }
    float sum = simd_sums<4>(sums, lane);
    float query_square = simd_shuffle(sum, uint(sum_of_lane<4>(0)));
    float key_square = simd_shuffle(sum, uint(sum_of_lane<4>(1)));
    float product = simd_shuffle(sum, uint(sum_of_lane<4>(2)));
    float query_scale = metal::rsqrt(query_square + 1e-6f) * metal::rsqrt(float(KEY_DIM));
    float key_scale = metal::rsqrt(key_square + 1e-6f);
    if (lane == 0) {
      factors[own].z = product * query_scale * key_scale;
    }
#pragma unroll
    for (int j = 0; j < KEY_BLOCKS; ++j) {
      int k = 32 * j + int(lane);
      float key = mixed[KEY_BLOCKS + j] * key_scale;
      staged[own * ROW + k] = mixed[j] * query_scale;
      staged[own * ROW + KEYS + k] = key;
      if (!SINGLE && keeps && k < KEY_DIM) {
        tape[value_columns + key_from + k] = R(key);
      }
    }
  }
  if (other < count) {
    auto tape = record + other_row * record_width;
    auto before = tape + (SINGLE ? 0 : record_width - channels);
    float mixed[VALUE_BLOCKS];
    delta_convolve<VALUE_DIM, 1, TAPS, SINGLE, R>(mixed, value_seen, conv_weight + value_from,
                                                  channels, 0, before + value_from, true, lane);
#pragma unroll
    for (int j = 0; j < VALUE_BLOCKS; ++j) {
      staged[other * ROW + VALUES_AT + 32 * j + lane] = mixed[j];
    }
    float decay = metal::exp(-metal::exp(rate) * delta_softplus(float(rates[0]) + bias));
    if (lane == 0) {
      factors[other].x = decay;
      factors[other].y = 1.0f / (1.0f + metal::exp(-float(rates[1])));
      if (!SINGLE) {
        tape[value_columns + key_columns + head] = R(decay);
        marks[other].x = other_step[0];
        marks[other].y = other_step[1];
        marks[other].z = other_step[2];
        marks[other].w = other_step[3];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = 0; i < count; ++i) {
    auto mark = marks[i];
    auto factor = factors[i];
    if (!SINGLE && mark.y >= 0) {
      delta_load_fours<OWN, KEY_DIM, LANES>(s, states + mark.y * state_size + state_at, within);
    }
    float query[EACH];
    float key[EACH];
#pragma unroll
    for (int j = 0; j < FOURS; ++j) {
      auto four = fours[i * ROW / 4 + LANES * j + within];
      query[4 * j] = four.x;
      query[4 * j + 1] = four.y;
      query[4 * j + 2] = four.z;
      query[4 * j + 3] = four.w;
      four = fours[(i * ROW + KEYS) / 4 + LANES * j + within];
      key[4 * j] = four.x;
      key[4 * j + 1] = four.y;
      key[4 * j + 2] = four.z;
      key[4 * j + 3] = four.w;
    }
    uint value = mine + uint(sum_of_lane<2 * OWN>(within));
    bool writes = lane % 2 == 0 && within < 2 * OWN;
    uint at = i * ROW + VALUES_AT + value;
    float wanted = writes ? staged[at] : 0.0f;
    // S' q = g S q + delta (k q): so one round of sums gives both delta and y, and a row that nothing
    // follows leaves the state as it is for its siblings.
    float sums[2 * OWN];
#pragma unroll
    for (int v = 0; v < OWN; ++v) {
      sums[v] = 0.0f;
      sums[v + OWN] = 0.0f;
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        sums[v] = metal::fma(s[v * EACH + j], key[j], sums[v]);
        sums[v + OWN] = metal::fma(s[v * EACH + j], query[j], sums[v + OWN]);
      }
    }
    // Even lanes have what was read for the key, the odd ones beside them that for the query.
    float read = simd_sums<2 * OWN, LANES>(sums, lane);
    float delta = factor.y * metal::fma(-factor.x, read, wanted);
    if (SINGLE || mark.w == 0) {
#pragma unroll
      for (int v = 0; v < OWN; ++v) {
        float change = simd_shuffle(delta, lane - within + uint(sum_of_lane<2 * OWN>(uint(v))));
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
          s[v * EACH + j] = metal::fma(change, key[j], s[v * EACH + j] * factor.x);
        }
      }
    }
    float asked = simd_shuffle_xor(factor.x * read, 1);
    if (writes) {
      staged[at] = metal::fma(delta, factor.z, asked);
      if (!SINGLE) {
        record[mark.x * record_width + head * VALUE_DIM + value] = R(delta);
      }
    }
    if (SINGLE || mark.z >= 0) {
      uint slot = SINGLE ? 0 : mark.z;
      delta_store_fours<OWN, KEY_DIM, LANES>(states + slot * state_size + state_at, s, within);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (other < count) {
    float found[VALUE_BLOCKS];
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < VALUE_BLOCKS; ++j) {
      found[j] = staged[other * ROW + VALUES_AT + 32 * j + lane];
      squares = metal::fma(found[j], found[j], squares);
    }
    float scale = metal::rsqrt(metal::fma(simd_sum(squares), 1.0f / float(VALUE_DIM), epsilon));
#pragma unroll
    for (int j = 0; j < VALUE_BLOCKS; ++j) {
      int value = 32 * j + int(lane);
      if (value < VALUE_DIM) {
        float gated = found[j] * scale * norm[j] * delta_silu(float(gate[j]));
        y[other_row * value_columns + head * VALUE_DIM + value] = T(gated);
      }
    }
  }
}
