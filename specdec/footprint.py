"""Footprint: how many bytes everything but the experts will take, from headers and configs alone.

Weights and state are counted exactly. Scratch, what a forward pass holds for its own duration, is
an estimate from above; its formulas stand in `prefill_scratch` and `verify_scratch`. All counts
are resident bytes: packed weights as they are, floats in the engine's dtype.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from specdec.checkpoint import Checkpoint
from specdec.draft.cache import cache_bytes
from specdec.draft.config import DraftConfig
from specdec.draft.weights import weight_bytes
from specdec.kernels.attention import BLOCK
from specdec.shards import FLOATS, TensorInfo
from specdec.target.config import TargetConfig
from specdec.target.state import KV_STEP

FLOAT = 4  # logits, scores, recurrent states and their inputs are always float32
QUERIES = 8  # heads and rows whose scores kernels/cpu computes together, where heads are fewer
SAMPLED = 52  # bytes per token of the vocabulary, from one row's logits to a drawn token
# MLX dispatches a layer's operations ahead of their execution: some of the next are alive too.
AHEAD = 1.25


@dataclass(frozen=True)
class Sizes:
    """What a run is planned for.

    prompt, context: tokens of the prompt, and of the prompt and everything generated.
    chunk: prompt tokens per prefill pass. budget: nodes of a tree, the root not counted.
    dtype: of activations and of weights that are not packed.
    row_by_row: whether attention and recurrence go from row to row, and arrays are freed as soon
        as they are done with, as in kernels/cpu; MLX holds the scores of all rows and heads, and
        solves for chunks of rows.
    threads: that compute row by row, each with its own inputs and scores.
    """

    prompt: int
    context: int
    chunk: int
    budget: int
    dtype: mx.Dtype
    row_by_row: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.prompt <= self.context
        assert self.chunk >= 1
        assert self.budget >= 1

    @property
    def rows(self) -> int:
        """Rows of a verify pass."""
        return verify_rows(self.budget)

    def scores(self, heads: int, rows: int) -> int:
        """How many queries the attention scores of a layer are held of at a time."""
        return self.threads * max(heads, QUERIES) if self.row_by_row else rows * heads

    def committed(self, draft: DraftConfig | None) -> int:
        """The most tokens a session commits: the last round may overshoot by a block."""
        return self.context + (draft.block_size if draft else 0)

    def staged(self, draft: DraftConfig | None) -> int:
        """The most positions that keys and values are written to: those of the last round's rows,
        which begins before the last token, and on a GPU of a round that is begun ahead of it."""
        rounds = 1 if self.row_by_row else 2
        return max(self.committed(draft), self.context - 1 + rounds * self.rows)


def verify_rows(budget: int) -> int:
    """Rows of a verify pass: plain decoding (budget 1) has the root alone."""
    return budget + 1 if budget > 1 else 1


def dense_parts(checkpoint: Checkpoint, config: TargetConfig, dtype: mx.Dtype) -> dict[str, int]:
    """Resident bytes of the target's weights without its experts, by part.

    Tensors of other models in the same files (vision, multi-token heads) are not loaded and do not
    count.
    """
    parts = {
        "embedding": 0,
        "head": 0,
        "attention": 0,
        "linear attention": 0,
        "routers, shared experts": 0,
        "dense MLPs": 0,
        "norms": 0,
    }
    for info, part in _dense_tensors(checkpoint, config):
        size = info.nbytes
        if info.dtype in FLOATS:
            # The decay of the gated delta rule is always computed in float32.
            wide = info.name.endswith((".A_log", ".dt_bias"))
            size = math.prod(info.shape) * (FLOAT if wide else dtype.size)
        parts[part] += size
    return {name: count for name, count in parts.items() if count}


def _dense_tensors(
    checkpoint: Checkpoint, config: TargetConfig
) -> Iterator[tuple[TensorInfo, str]]:
    layers = {f"{config.prefix}layers.{i}.": i for i in range(config.num_layers)}
    modules = {".self_attn.": "attention", ".linear_attn.": "linear attention"}
    for name, info in checkpoint.tensors.items():
        layer = next((i for prefix, i in layers.items() if name.startswith(prefix)), None)
        if name.startswith(f"{config.prefix}embed_tokens."):
            yield info, "embedding"
        elif name.startswith(f"{config.head_prefix}lm_head."):
            if not config.tie_word_embeddings:
                yield info, "head"
        elif name == f"{config.prefix}norm.weight":
            yield info, "norms"
        elif layer is None or ".mlp.switch_mlp." in name:
            continue
        elif ".mlp." in name:
            dense = layer in config.dense_layers
            yield info, "dense MLPs" if dense else "routers, shared experts"
        else:
            yield info, next((part for key, part in modules.items() if key in name), "norms")


def kv_capacity(context: int) -> int:
    """Positions the key and value buffers hold once `context` of them were written to."""
    return -(-context // KV_STEP) * KV_STEP


def kv_bytes(config: TargetConfig, context: int, dtype: mx.Dtype) -> int:
    """Keys and values [kv_heads, capacity, head_dim] of all full-attention layers."""
    row = 2 * config.num_kv_heads * config.head_dim * dtype.size
    return len(config.full_layers) * kv_capacity(context) * row


def state_bytes(config: TargetConfig, dtype: mx.Dtype) -> int:
    """Recurrent states and convolution rows of all linear-attention layers."""
    gdn = config.gdn
    if gdn is None:
        return 0
    recurrent = gdn.num_value_heads * gdn.value_dim * gdn.key_dim * FLOAT
    conv = (gdn.conv_kernel - 1) * gdn.conv_channels * dtype.size
    return len(config.linear_layers) * (recurrent + conv)


def draft_bytes(checkpoint: Checkpoint, config: DraftConfig, sizes: Sizes) -> tuple[int, int]:
    """The draft's weights, and its keys and values once the context is full."""
    return (
        weight_bytes(checkpoint, config, sizes.dtype, as_stored=sizes.row_by_row),
        cache_bytes(config, sizes.committed(config), sizes.dtype),
    )


def prefill_scratch(config: TargetConfig, draft: DraftConfig | None, sizes: Sizes) -> int:
    """What a prompt's passes hold beside weights and state.

    The widest layer's activations of a chunk, and what threads keep of them; two copies of its
    attention scores; new states, twice, before they replace the old ones; the chunk's taps, twice,
    and the draft's pass over them.
    """
    chunk, size = min(sizes.chunk, sizes.prompt), sizes.dtype.size
    passes = _layer_bytes(config, chunk, sizes) + _inputs_bytes(config, draft, chunk, sizes)
    passes += 2 * sizes.scores(config.num_heads, chunk) * sizes.context * FLOAT
    passes += 2 * state_bytes(config, sizes.dtype) + 2 * config.vocab_size * FLOAT
    if draft is None:
        return passes
    taps = chunk * len(draft.target_layer_ids) * config.hidden_size * size
    keys = 6 * draft.num_kv_heads * draft.head_dim * draft.num_layers
    extend = chunk * (3 * draft.hidden_size + keys) * size
    return max(2 * taps + passes, 2 * taps + extend)


def verify_scratch(config: TargetConfig, draft: DraftConfig | None, sizes: Sizes) -> int:
    """What a round holds: the largest of the draft's pass, the tree's pass and its commit.

    The tree's pass: the widest layer's activations; two copies of its attention scores; what commit
    will need of every layer; logits [rows, vocab] twice. In MLX also the last keys and values of
    each row's own path, a partial sum per block, and four copies of a recurrent state per row; row
    by row, one head's states of all rows for each thread, and one layer's state twice.
    Choosing: the logits, and what a sampler makes of one row of them.
    Commit: three generations of all states, and one layer's keys and values while they grow.
    The draft's pass: a block's activations, scores and logits, thrice.
    """
    rows, gdn, dtype = sizes.rows, config.gdn, sizes.dtype
    tree = _layer_bytes(config, rows, sizes) + _inputs_bytes(config, draft, rows, sizes)
    tree += 2 * rows * config.vocab_size * FLOAT
    tree += 2 * sizes.scores(config.num_heads, rows) * sizes.context * FLOAT
    if not sizes.row_by_row:
        tree += 4 * rows * 2 * BLOCK * config.num_kv_heads * config.head_dim * FLOAT
        tree += rows * config.num_heads * (config.head_dim + 1) * (sizes.context // BLOCK) * FLOAT
    tape = len(config.full_layers) * 2 * config.num_kv_heads * config.head_dim
    if gdn is not None:
        head = gdn.value_dim * gdn.key_dim * FLOAT
        if sizes.row_by_row:
            # Keys, deltas and decays, beside the convolution's rows.
            features = gdn.keys + gdn.values + gdn.num_value_heads
            tree += (sizes.threads * rows + 2 * gdn.num_value_heads) * head
        else:
            features = gdn.num_value_heads * (gdn.value_dim + gdn.key_dim)
            tree += 4 * rows * gdn.num_value_heads * head
        tape += len(config.linear_layers) * (gdn.conv_channels + features)
    tape *= rows * FLOAT
    grown = kv_bytes(config, sizes.context, dtype) // max(1, len(config.full_layers))
    commit = 3 * state_bytes(config, dtype) + grown
    choosing = (2 * rows * FLOAT + SAMPLED) * config.vocab_size
    drafting = 0
    if draft is not None:
        block = draft.block_size
        widths = 3 * draft.intermediate_size + 8 * draft.hidden_size + config.vocab_size
        scores = draft.num_heads * (sizes.context + block)
        drafting = 3 * block * (widths + scores) * FLOAT
    if not sizes.row_by_row:  # on a GPU the next round is begun beside one that is not committed
        tape, tree = 2 * tape, tree + commit
    return max(tape + max(tree, commit, choosing), drafting)


def _layer_bytes(config: TargetConfig, rows: int, sizes: Sizes) -> int:
    """Activations of the widest layer for `rows` rows, as if none were freed before its end.

    Row by row: before the end of its mixer or of its experts.
    """
    hidden, size = config.hidden_size, sizes.dtype.size
    # Queries and their gates, keys and values: projected, normalized, rotated, laid out.
    mixer = 10 * config.num_heads * config.head_dim * size
    if config.gdn is not None:
        gdn = config.gdn
        if sizes.row_by_row:
            # Projections, before and after the convolution; normalized keys and queries; values,
            # results, normalized, padded.
            width = (3 * gdn.conv_channels + 2 * gdn.keys + 5 * gdn.values) * size
        else:
            # The convolution's taps; queries, keys and values repeated per value head and then
            # weighted, decayed and solved for in float32.
            wide = gdn.num_value_heads * max(gdn.key_dim, gdn.value_dim)
            width = (gdn.conv_kernel + 2) * gdn.conv_channels * size + 24 * wide * FLOAT
        mixer = max(mixer, width)
    inner = config.moe_intermediate_size
    experts = config.top_k * (3 * inner + 3 * hidden) + 3 * config.num_experts
    experts += 3 * max(config.shared_intermediate_size, config.intermediate_size)
    experts *= size
    residual = 6 * hidden * size
    if sizes.row_by_row:
        return rows * (residual + max(mixer, experts))
    return int(AHEAD * rows * (residual + mixer + experts))


def _inputs_bytes(config: TargetConfig, draft: DraftConfig | None, rows: int, sizes: Sizes) -> int:
    """What threads keep for themselves of `rows` rows.

    The widest inputs of a matrix, or the inputs of experts, normalized and laid out, with what
    stands between their matrices and their output.
    """
    if not sizes.row_by_row:
        return 0
    widths = [
        4 * config.hidden_size
        + 3 * max(config.moe_intermediate_size, config.shared_intermediate_size),
        config.intermediate_size,
        config.num_heads * config.head_dim,
        0 if config.gdn is None else config.gdn.values,
        0 if draft is None else len(draft.target_layer_ids) * config.hidden_size,
    ]
    return sizes.threads * rows * max(widths) * FLOAT
