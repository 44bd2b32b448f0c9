// The mixer of a gated delta layer over a tree, one threadgroup of VALUE_DIM / VALUES simdgroups
// per value head. Rows are taken CHUNK at a time in the order of `program`: convolution and gates,
// the norms of queries and keys, the recurrence, each simdgroup with VALUES rows of the state in
// registers, and the output norm. A row's operations are the same in every tree, wherever it stands.
//
// qkv, z, b, a T [rows, ...]: pieces that begin at columns starts[0..3], of `channels` (queries, keys,
// values), heads * VALUE_DIM, heads and heads columns. conv_weight T [TAPS, channels]; a_log, dt_bias
// float [heads]; norm_weight T [VALUE_DIM]; eps float [1]; conv T [TAPS - 1, channels], committed;
// state float [heads, VALUE_DIM, KEY_DIM], committed. heads / REPEATS key heads.
// program int [1 + steps * (4 + TAPS)]: the number of steps, and for each its row, the
// slot with the state it begins with (-1: the state at hand), the slot to keep its state in or -1,
// whether nothing follows it, and its window.
// -> y T [rows, heads * VALUE_DIM], and if SINGLE, after the only row,
// record R = T [TAPS - 1, channels] and states float [heads, VALUE_DIM, KEY_DIM]; else the tape,
// record R = float [rows, delta [heads, VALUE_DIM] + keys [key heads, KEY_DIM] + decay [heads] +
// channels before the convolution], and room for states float [slots, heads, VALUE_DIM, KEY_DIM].
//
// Slots lie in device memory: the state of a head (64 KB at 128 x 128) is larger than threadgroup
// memory, and a second one in registers would leave too few for 512 threads. Few trees need one.
constexpr int SIMDGROUPS = VALUE_DIM / VALUES;
constexpr int EACH = (KEY_DIM + 31) / 32;
constexpr int CHUNK = SINGLE ? 1 : 8;
constexpr int BATCH = SINGLE ? 1 : TAPS > 4 || EACH > 4 ? 2 : 4;  // more, and registers run out
// Of a row in threadgroup memory, in blocks of 32: query, key, values (later y), output gates.
constexpr int KEYS = 32 * EACH;
constexpr int VALUES_AT = 2 * KEYS;
constexpr int GATES_AT = VALUES_AT + (VALUE_DIM + 31) / 32 * 32;
constexpr int ROW = 2 * GATES_AT - VALUES_AT;
SHARED(float, staged, CHUNK * ROW);
SHARED(float, decays, CHUNK);
SHARED(float, betas, CHUNK);
SHARED(float, products, CHUNK);
SHARED(int, marks, CHUNK * 4);
uint lane = thread_index_in_simdgroup;
int simdgroup = simdgroup_index_in_threadgroup;
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
uint stride = qkv_shape[1];
int steps = SINGLE ? 1 : program[0];

for (int first = 0; first < steps; first += CHUNK) {
  int count = SINGLE ? 1 : metal::min(CHUNK, steps - first);
  auto chunk = program + 1 + first * (4 + TAPS);
  for (int block = simdgroup; block < ROW / 32; block += SIMDGROUPS) {
    if (block < GATES_AT / 32) {
      bool key = block < VALUES_AT / 32;
      int within = 32 * (key ? block % EACH : block - VALUES_AT / 32) + lane;
      bool inside = within < (key ? KEY_DIM : VALUE_DIM);
      uint channel = key ? block / EACH * key_columns + head / REPEATS * KEY_DIM + within
                         : 2 * key_columns + head * VALUE_DIM + within;
      channel = inside ? channel : 0;
      auto x = qkv + starts[0] + channel;
      auto before = conv + channel;
      float weight[TAPS];
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) {
        weight[tap] = float(conv_weight[tap * channels + channel]);
      }
      // One value head of those that share a key head keeps its columns.
      bool keeps = inside && (!key || head % REPEATS == 0);
      for (int i = 0; i < count; i += BATCH) {
        float seen[BATCH * TAPS];
        uint rows[BATCH];
        // all loads, then all stores, so that none waits for another
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
          auto step = chunk + metal::min(i + n, count - 1) * (4 + TAPS);
          rows[n] = SINGLE ? 0 : step[0];
#pragma unroll
          for (int tap = 0; tap < TAPS; ++tap) {
            int at = SINGLE ? tap : step[4 + tap];
            auto place = at < TAPS - 1 ? before + at * channels : x + (at - (TAPS - 1)) * stride;
            seen[n * TAPS + tap] = float(*place);
          }
        }
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
          float sum = 0.0f;
#pragma unroll
          for (int tap = 0; tap < TAPS; ++tap) {
            sum = metal::fma(seen[n * TAPS + tap], weight[tap], sum);
          }
          if (i + n < count) {
            staged[(i + n) * ROW + 32 * block + lane] = inside ? delta_silu(sum) : 0.0f;
            auto kept = record + (SINGLE ? 0 : (rows[n] + 1) * record_width - channels) + channel;
            for (int tap = SINGLE ? 1 : TAPS - 1; tap < TAPS && keeps; ++tap) {
              kept[(SINGLE ? tap - 1 : 0) * channels] = R(seen[n * TAPS + tap]);
            }
          }
        }
      }
    } else {
      int value = 32 * block - GATES_AT + lane;
      bool inside = value < VALUE_DIM;
      value = inside ? value : 0;
      float weight = float(norm_weight[value]);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        uint row = SINGLE ? 0 : chunk[i * (4 + TAPS)];
        float gate = float(z[row * z_shape[1] + starts[1] + head * VALUE_DIM + value]);
        staged[i * ROW + 32 * block + lane] = inside ? delta_silu(gate) * weight : 0.0f;
      }
    }
  }
  if (simdgroup == SIMDGROUPS - 1 && int(lane) < count) {
    auto step = chunk + lane * (4 + TAPS);
    uint row = SINGLE ? 0 : step[0];
    float change = delta_softplus(float(a[row * a_shape[1] + starts[3] + head]) + dt_bias[head]);
    float decay = metal::exp(-metal::exp(a_log[head]) * change);
    decays[lane] = decay;
    betas[lane] = 1.0f / (1.0f + metal::exp(-float(b[row * b_shape[1] + starts[2] + head])));
    if (!SINGLE) {
      record[row * record_width + value_columns + key_columns + head] = R(decay);
      for (int i = 0; i < 4; ++i) {
        marks[4 * lane + i] = step[i];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = simdgroup; i < count; i += SIMDGROUPS) {
    float query[EACH];
    float key[EACH];
    float query_squares = 0.0f;
    float key_squares = 0.0f;
    float product = 0.0f;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      query[j] = staged[i * ROW + 32 * j + lane];
      key[j] = staged[i * ROW + KEYS + 32 * j + lane];
      query_squares = metal::fma(query[j], query[j], query_squares);
      key_squares = metal::fma(key[j], key[j], key_squares);
      product = metal::fma(query[j], key[j], product);
    }
    float key_scale = metal::rsqrt(simd_sum(key_squares) + 1e-6f);
    float query_scale = metal::rsqrt(simd_sum(query_squares) + 1e-6f) / metal::sqrt(float(KEY_DIM));
    product = simd_sum(product) * query_scale * key_scale;
    if (lane == 0) {
      products[i] = product;
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      uint k = 32 * j + lane;
      staged[i * ROW + k] = query[j] * query_scale;
      staged[i * ROW + KEYS + k] = key[j] * key_scale;
      if (!SINGLE && head % REPEATS == 0 && k < KEY_DIM) {
        uint at = marks[4 * i] * record_width + value_columns + head / REPEATS * KEY_DIM + k;
        record[at] = R(key[j] * key_scale);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = 0; i < count; ++i) {
    if (!SINGLE && marks[4 * i + 1] >= 0) {
      delta_load<VALUES, KEY_DIM>(s, states + marks[4 * i + 1] * heads * head_size + state_at, lane);
    }
    float decay = decays[i];
    float key[EACH];
    float query[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      query[j] = staged[i * ROW + 32 * j + lane];
      key[j] = staged[i * ROW + KEYS + 32 * j + lane];
    }
    // S' q = g S q + delta (k q): so one round of sums gives both delta and y, and a row that nothing
    // follows leaves the state as it is for its siblings.
    float sums[2 * VALUES];
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      sums[v] = 0.0f;
      sums[v + VALUES] = 0.0f;
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        sums[v] = metal::fma(s[v * EACH + j], key[j], sums[v]);
        sums[v + VALUES] = metal::fma(s[v * EACH + j], query[j], sums[v + VALUES]);
      }
    }
    // Even lanes have what was read for the key, the odd ones beside them that for the query.
    float read = decay * simd_sums<2 * VALUES>(sums, lane);
    float asked = simd_shuffle_xor(read, 1);
    float delta = 0.0f;
    if (lane % 2 == 0 && lane < 2 * VALUES) {
      uint value = simdgroup * VALUES + uint(sum_of_lane<2 * VALUES>(lane));
      uint at = i * ROW + VALUES_AT + value;
      delta = betas[i] * (staged[at] - read);
      staged[at] = metal::fma(delta, products[i], asked);
      if (!SINGLE) {
        record[marks[4 * i] * record_width + head * VALUE_DIM + value] = R(delta);
      }
    }
    if (SINGLE || marks[4 * i + 3] == 0) {
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        float own = simd_shuffle(delta, uint(sum_of_lane<2 * VALUES>(uint(v))));
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
          s[v * EACH + j] = metal::fma(own, key[j], s[v * EACH + j] * decay);
        }
      }
    }
    if (SINGLE || marks[4 * i + 2] >= 0) {
      uint slot = SINGLE ? 0 : marks[4 * i + 2];
      delta_store<VALUES, KEY_DIM>(states + slot * heads * head_size + state_at, s, lane);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int i = simdgroup; i < count; i += SIMDGROUPS) {
    uint row = SINGLE ? 0 : marks[4 * i];
    float squares = 0.0f;
    for (int value = lane; value < VALUE_DIM; value += 32) {
      float found = staged[i * ROW + VALUES_AT + value];
      squares = metal::fma(found, found, squares);
    }
    float scale = metal::rsqrt(simd_sum(squares) / float(VALUE_DIM) + eps[0]);
    for (int value = lane; value < VALUE_DIM; value += 32) {
      float gated = staged[i * ROW + VALUES_AT + value] * scale * staged[i * ROW + GATES_AT + value];
      y[row * value_columns + head * VALUE_DIM + value] = T(gated);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
