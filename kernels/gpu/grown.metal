// A draft's block grown to a tree of ROWS rows, best-first (specdec/tree/build.py), and all that a
// verify pass reads of it: what the host makes of trees it grew (prepared.py), in other words. One
// simdgroup; a lane has one row.
// found int [SLOTS, 2 * WIDTH + 3], as kernels.top_tokens; came int [36], of the round before, as
// kernels.walked says; cos, sin float [SLOTS + 1 + came[0] or more, half], of the position where that
// round began and those that follow
// -> tokens int [ROWS]; tree int [3 * ROWS + 1]: tokens, parents, the bits of the weights, whether
//    the draft's logits are finite; paths int [ROWS, COLUMNS], as attention.py says; program
//    int [1 + ROWS * (4 + TAPS)], as delta_tree.metal says; turn_cos, turn_sin float [ROWS, half]
// grid (32, 1, 1), threadgroup (32, 1, 1)
constexpr float LEAST = -1e30f;  // of a weight that can be taken: for NaN, and for no chance at all
constexpr int LINE = 2 * WIDTH + 3;
SHARED(float, chances, SLOTS * WIDTH);
SHARED(int, depths, 32);
const int me = int(thread_index_in_simdgroup);
bool finite = true;
for (int slot = 0; slot < SLOTS; ++slot) {
  auto line = found + slot * LINE;
  const float total = as_type<float>(line[2 * WIDTH]) + metal::log(as_type<float>(line[2 * WIDTH + 1]));
  finite = finite && metal::isfinite(total);
  for (int i = me; i < WIDTH; i += 32) {
    const float chance = as_type<float>(line[WIDTH + i]) - total;
    chances[slot * WIDTH + i] = chance > LEAST ? chance : LEAST;
  }
}
simdgroup_barrier(mem_flags::mem_threadgroup);

// A row that is taken opens its most probable child and its next sibling; the heaviest of what is
// open is taken next.
int token = came[33], parent = -1, depth = 0, rank = 0;
float weight = 0.0f;
float child = me == 0 ? chances[0] : -INF;
float sibling = -INF;
for (int row = 1; row < ROWS; ++row) {
  const float best = simd_max(metal::max(child, sibling));
  const uint from = uint(simd_min(child == best || sibling == best ? me : 31));
  const bool below = simd_shuffle(child, from) == best;
  const int above = below ? int(from) : simd_shuffle(parent, from);
  const int deep = simd_shuffle(depth, from) + (below ? 1 : 0);
  const int place = below ? 0 : simd_shuffle(rank, from) + 1;
  const float base = simd_shuffle(weight, uint(above));
  if (me == int(from)) {
    child = below ? -INF : child;
    sibling = below ? sibling : -INF;
  }
  if (me == row) {
    token = found[(deep - 1) * LINE + place];
    parent = above;
    depth = deep;
    rank = place;
    weight = best;
    child = deep < SLOTS ? best + chances[deep * WIDTH] : -INF;
    sibling = place + 1 < WIDTH ? base + chances[(deep - 1) * WIDTH + place + 1] : -INF;
  }
}

// As masks of rows: this one and those above it, this one and those below it, its children, and
// which rows have children.
uint path = me == 0 ? 1u : 0u;
for (int row = 1; row < ROWS; ++row) {
  const uint above = simd_shuffle(path, uint(simd_shuffle(parent, uint(row))));
  if (me == row) path = above | (1u << row);
}
uint under = 0, children = 0, inner = 0;
for (int row = 0; row < ROWS; ++row) {
  under |= (simd_shuffle(path, uint(row)) >> me & 1u) << row;
  children |= simd_shuffle(parent, uint(row)) == me ? 1u << row : 0u;
}
for (int row = 0; row < ROWS; ++row) {
  inner |= simd_shuffle(children, uint(row)) != 0 ? 1u << row : 0u;
}

// The walk of tree_program.py: leaves first, of the children that have children the one with most
// below it last, so that few states are kept at a time.
const int size = int(metal::popcount(under));
int last = -1, most = 0;
for (int row = 1; row < ROWS; ++row) {
  const int other = simd_shuffle(size, uint(row));
  const bool better = (children & inner) >> row & 1u && other > most;
  last = better ? row : last;
  most = better ? other : most;
}
const bool branches = metal::popcount(children & inner) > 1;
const uint up = uint(metal::max(parent, 0));
const int last_beside = simd_shuffle(last, up);
const bool leaf = children == 0;
int before = 0, kept_for = 0;  // rows beside it and below them that come first, of these with children
for (int row = 1; row < ROWS; ++row) {
  const int other = simd_shuffle(size, uint(row));
  const bool beside = simd_shuffle(parent, uint(row)) == parent && row != me;
  const bool first = other == 1 ? !leaf || row < me
                                : !leaf && row != last_beside && (me == last_beside || row < me);
  before += beside && first ? other : 0;
  kept_for += beside && first && other > 1 ? 1 : 0;
}
int step = 0, taken = 0;
for (int row = 1; row < ROWS; ++row) {
  const uint above = uint(simd_shuffle(parent, uint(row)));
  const int steps = simd_shuffle(step, above) + 1;
  const int slots = simd_shuffle(taken, above);
  const bool two = simd_shuffle(branches ? 1 : 0, above) != 0;
  if (me == row) {
    step = steps + before;
    taken = slots + (two && !leaf && me != last_beside ? 1 : 0);
  }
}
const int keep = branches ? taken : -1;
const int kept_above = simd_shuffle(keep, up);

depths[me] = depth;
simdgroup_barrier(mem_flags::mem_threadgroup);
if (me == 0) {
  program[0] = ROWS;
  tree[3 * ROWS] = finite ? 1 : 0;
}
if (me < ROWS) {
  tokens[me] = token;
  tree[me] = token;
  tree[ROWS + me] = parent;
  tree[2 * ROWS + me] = as_type<int>(weight);
  auto line = paths + me * COLUMNS;
  line[0] = came[34] + depth;
  line[1] = came[34];
  uint left = path;
  for (int i = 2; i < COLUMNS; ++i) {
    line[i] = left != 0 ? lowest_bit(left) : -1;
    left &= left - 1u;
  }
  auto entry = program + 1 + step * (4 + TAPS);
  entry[0] = me;
  entry[1] = !leaf && kept_for > 0 ? kept_above : -1;
  entry[2] = keep;
  entry[3] = leaf ? 1 : 0;
  for (int tap = 0; tap < TAPS; ++tap) {
    const int at = depth - (TAPS - 1 - tap);  // of the ancestor, negative before the root
    entry[4 + tap] = TAPS - 1 + (at < 0 ? at : lowest_bit(without_lowest(path, at)));
  }
}
const int half = int(cos_shape[1]);
for (int i = me; i < ROWS * half; i += 32) {
  const int at = (came[0] + depths[i / half]) * half + i % half;
  turn_cos[i] = cos[at];
  turn_sin[i] = sin[at];
}
