// The states and convolution rows of up to four gated delta layers after an accepted path, with the
// bits that delta_tree gives the same rows one by one. A simdgroup takes VALUES rows of a state.
//
// path int [..]: its length, then its rows. Of layer 0..3: state float [HEADS, VALUE_DIM, KEY_DIM],
// conv T [TAPS - 1, channels], tape float [rows, width] (record in delta_tree.metal); of layers that
// there are not, any of these.
// -> next_state float [HEADS, VALUE_DIM, KEY_DIM], next_conv T [TAPS - 1, channels] of each layer
constexpr int EACH = (KEY_DIM + 31) / 32;
constexpr int KEY_COLUMNS = HEADS / REPEATS * KEY_DIM;
constexpr int CHANNELS = 2 * KEY_COLUMNS + HEADS * VALUE_DIM;
constexpr int WIDTH = HEADS * VALUE_DIM + KEY_COLUMNS + HEADS + CHANNELS;
uint layer = threadgroup_position_in_grid.y;
auto state = layer == 0 ? state0 : layer == 1 ? state1 : layer == 2 ? state2 : state3;
auto conv = layer == 0 ? conv0 : layer == 1 ? conv1 : layer == 2 ? conv2 : conv3;
auto tape = layer == 0 ? tape0 : layer == 1 ? tape1 : layer == 2 ? tape2 : tape3;
auto next_state = layer == 0 ? next_state0 : layer == 1 ? next_state1 : layer == 2 ? next_state2 : next_state3;
auto next_conv = layer == 0 ? next_conv0 : layer == 1 ? next_conv1 : layer == 2 ? next_conv2 : next_conv3;
uint lane = thread_index_in_simdgroup;
int length = path[0];

uint value = (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * VALUES;
if (value < HEADS * VALUE_DIM) {
  uint head = value / VALUE_DIM;
  float s[VALUES * EACH];
  delta_load<VALUES, KEY_DIM>(s, state + value * KEY_DIM, lane);
  for (int step = 1; step <= length; ++step) {
    auto row = tape + path[step] * WIDTH;
    auto key_row = row + HEADS * VALUE_DIM + head / REPEATS * KEY_DIM;
    float decay = row[HEADS * VALUE_DIM + KEY_COLUMNS + head];
    float key[EACH];
    delta_load<1, KEY_DIM>(key, key_row, lane);
#pragma unroll
    for (int v = 0; v < VALUES; ++v) {
      float delta = row[value + v];
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        s[v * EACH + j] = metal::fma(delta, key[j], s[v * EACH + j] * decay);
      }
    }
  }
  delta_store<VALUES, KEY_DIM>(next_state + value * KEY_DIM, s, lane);
}

uint threads = threadgroups_per_grid.x * threads_per_threadgroup.x;
for (uint i = thread_position_in_grid.x; i < (TAPS - 1) * CHANNELS; i += threads) {
  int at = length + int(i / CHANNELS) - (TAPS - 1);
  uint channel = i % CHANNELS;
  next_conv[i] = at < 0 ? conv[i + length * CHANNELS]
                        : T(tape[path[1 + at] * WIDTH + WIDTH - CHANNELS + channel]);
}
