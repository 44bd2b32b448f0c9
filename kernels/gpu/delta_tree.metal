// The mixer of a gated delta layer over a tree, one threadgroup of VALUE_DIM / VALUES simdgroups
// per value head. Rows are staged CHUNK at a time in the order of `program`: convolution, norms,
// gates; then the recurrence, each simdgroup with VALUES rows of the state in registers; then the
// output norm. A row's operations are the same in every tree and at every place in it.
//
// qkv, z, b, a T [rows, ...]: pieces that begin at columns program[0..3], of `channels` (queries, keys,
// values), heads * VALUE_DIM, heads and heads columns. conv_weight T [TAPS, channels]; a_log, dt_bias
// float [heads]; norm_weight T [VALUE_DIM]; eps float [1]; conv T [TAPS - 1, channels], committed;
// state float [heads, VALUE_DIM, KEY_DIM], committed. heads / REPEATS key heads.
// program int [5 + steps * (4 + TAPS)]: the columns, the number of steps, and for each its row, the
// slot with the state it begins with (-1: the state at hand), the slot to keep its state in or -1,
// whether nothing follows it, and its window.
// -> y T [rows, heads * VALUE_DIM], and if SINGLE, after the only row,
// record R = T [TAPS - 1, channels] and states float [heads, VALUE_DIM, KEY_DIM]; else the tape,
// record R = float [rows, delta [heads, VALUE_DIM] + keys [key heads, KEY_DIM] + decay [heads] +
// channels before the convolution], and room for states float [slots, heads, VALUE_DIM, KEY_DIM].
constexpr int EACH = (KEY_DIM + 31) / 32;
constexpr int PADDED = 32 * EACH;
constexpr int CHUNK = SINGLE ? 1 : (2 * PADDED + 2 * VALUE_DIM + 3) * 4 * 8 <= 32768 ? 8 : 4;
SHARED(float, queries, CHUNK * PADDED);
SHARED(float, keys, CHUNK * PADDED);
SHARED(float, values, CHUNK * VALUE_DIM);
SHARED(float, gates, CHUNK * VALUE_DIM);
SHARED(float, scalars, CHUNK * 3);
uint lane = thread_index_in_simdgroup;
uint simdgroup = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.x;
uint heads = threadgroups_per_grid.x;
uint key_columns = heads / REPEATS * KEY_DIM;
uint value_columns = heads * VALUE_DIM;
uint channels = 2 * key_columns + value_columns;
uint record_width = value_columns + key_columns + heads + channels;
uint head_size = VALUE_DIM * KEY_DIM;
uint state_at = head * head_size + simdgroup * VALUES * KEY_DIM;

float s[VALUES * EACH];
delta_load<VALUES, KEY_DIM>(s, state + state_at, lane);
auto x = qkv + program[0];
uint stride = qkv_shape[1];
int steps = SINGLE ? 1 : program[4];

for (int first = 0; first < steps; first += CHUNK) {
  int count = metal::min(CHUNK, steps - first);
  for (int item = simdgroup; item < 2 * count; item += VALUE_DIM / VALUES) {
    int i = item / 2;
    auto step = program + 5 + (first + i) * (4 + TAPS);
    auto window = step + 4;
    uint row = SINGLE ? 0 : step[0];
    auto kept = record + (SINGLE ? 0 : (row + 1) * record_width - channels);
    if (item % 2 == 0) {
      float query_squares = 0.0f;
      float key_squares = 0.0f;
      float products = 0.0f;
#pragma unroll 1
      for (uint k = lane; k < PADDED; k += 32) {
        float query = 0.0f;
        float key = 0.0f;
        if (k < KEY_DIM) {
          uint at = head / REPEATS * KEY_DIM + k;
          query = delta_convolved<SINGLE, TAPS>(window, conv + at, x + at, conv_weight + at, channels, stride);
          if (head % REPEATS == 0) {
            delta_keep<R, SINGLE, TAPS>(kept + at, window, conv + at, x + at, channels, stride);
          }
          at += key_columns;
          key = delta_convolved<SINGLE, TAPS>(window, conv + at, x + at, conv_weight + at, channels, stride);
          if (head % REPEATS == 0) {
            delta_keep<R, SINGLE, TAPS>(kept + at, window, conv + at, x + at, channels, stride);
          }
        }
        queries[i * PADDED + k] = query;
        keys[i * PADDED + k] = key;
        query_squares = metal::fma(query, query, query_squares);
        key_squares = metal::fma(key, key, key_squares);
        products = metal::fma(query, key, products);
      }
      float key_scale = metal::rsqrt(simd_sum(key_squares) + 1e-6f);
      float query_scale = metal::rsqrt(simd_sum(query_squares) + 1e-6f) / metal::sqrt(float(KEY_DIM));
      products = simd_sum(products) * query_scale * key_scale;
      float step_size = delta_softplus(float(a[row * a_shape[1] + program[3] + head]) + dt_bias[head]);
      float decay = metal::exp(-metal::exp(a_log[head]) * step_size);
      if (lane == 0) {
        scalars[3 * i] = decay;
        scalars[3 * i + 1] = 1.0f / (1.0f + metal::exp(-float(b[row * b_shape[1] + program[2] + head])));
        scalars[3 * i + 2] = products;
        if (!SINGLE) {
          record[row * record_width + value_columns + key_columns + head] = R(decay);
        }
      }
      for (uint k = lane; k < PADDED; k += 32) {
        float key = keys[i * PADDED + k] * key_scale;
        queries[i * PADDED + k] = queries[i * PADDED + k] * query_scale;
        keys[i * PADDED + k] = key;
        if (!SINGLE && head % REPEATS == 0 && k < KEY_DIM) {
          record[row * record_width + value_columns + head / REPEATS * KEY_DIM + k] = R(key);
        }
      }
    } else {
      for (int value = lane; value < VALUE_DIM; value += 32) {
        uint at = 2 * key_columns + head * VALUE_DIM + value;
        values[i * VALUE_DIM + value] =
            delta_convolved<SINGLE, TAPS>(window, conv + at, x + at, conv_weight + at, channels, stride);
        delta_keep<R, SINGLE, TAPS>(kept + at, window, conv + at, x + at, channels, stride);
        float gate = float(z[row * z_shape[1] + program[1] + head * VALUE_DIM + value]);
        gates[i * VALUE_DIM + value] = delta_silu(gate) * float(norm_weight[value]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = 0; i < count; ++i) {
    auto step = program + 5 + (first + i) * (4 + TAPS);
    if (!SINGLE && step[1] >= 0) {
      delta_load<VALUES, KEY_DIM>(s, states + step[1] * heads * head_size + state_at, lane);
    }
    float decay = scalars[3 * i];
    float key[EACH];
    float query[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      key[j] = keys[i * PADDED + 32 * j + lane];
      query[j] = queries[i * PADDED + 32 * j + lane];
    }
    // S' q = (g S) q + delta (k q): so one round of sums gives both delta and y, and a row that
    // nothing follows leaves the state as it is for its siblings.
    float sums[2 * VALUES];
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      sums[v] = 0.0f;
      sums[v + VALUES] = 0.0f;
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        float decayed = s[v * EACH + j] * decay;
        sums[v] = metal::fma(decayed, key[j], sums[v]);
        sums[v + VALUES] = metal::fma(decayed, query[j], sums[v + VALUES]);
      }
    }
    // Even lanes have what was read for the key, the odd ones beside them that for the query.
    float read = delta_sums<2 * VALUES>(sums, lane);
    float asked = simd_shuffle_xor(read, 1);
    float delta = 0.0f;
    if (lane % 2 == 0 && lane < 2 * VALUES) {
      uint value = simdgroup * VALUES + delta_sum_of<2 * VALUES>(lane);
      delta = scalars[3 * i + 1] * (values[i * VALUE_DIM + value] - read);
      values[i * VALUE_DIM + value] = metal::fma(delta, scalars[3 * i + 2], asked);
      if (!SINGLE) {
        record[step[0] * record_width + head * VALUE_DIM + value] = R(delta);
      }
    }
    if (SINGLE || step[3] == 0) {
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        float own = simd_shuffle(delta, delta_sum_of<2 * VALUES>(v));
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
          s[v * EACH + j] = metal::fma(own, key[j], s[v * EACH + j] * decay);
        }
      }
    }
    if (!SINGLE && step[2] >= 0) {
      delta_store<VALUES, KEY_DIM>(states + step[2] * heads * head_size + state_at, s, lane);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = simdgroup; i < count; i += VALUE_DIM / VALUES) {
    uint row = SINGLE ? 0 : program[5 + (first + i) * (4 + TAPS)];
    float squares = 0.0f;
    for (int value = lane; value < VALUE_DIM; value += 32) {
      squares = metal::fma(values[i * VALUE_DIM + value], values[i * VALUE_DIM + value], squares);
    }
    float scale = metal::rsqrt(simd_sum(squares) / float(VALUE_DIM) + eps[0]);
    for (int value = lane; value < VALUE_DIM; value += 32) {
      float gated = values[i * VALUE_DIM + value] * scale * gates[i * VALUE_DIM + value];
      y[row * value_columns + head * VALUE_DIM + value] = T(gated);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (SINGLE) {
  delta_store<VALUES, KEY_DIM>(states + state_at, s, lane);
}
