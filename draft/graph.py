"""DraftGraph: telling a draft of a few rows and asking it, compiled by MLX as one graph.

On a GPU building the draft's operations in Python takes longer than running them. Passes over
buffers of one size are one graph: the rows told, how many of them count, where they go and what is
seen go in as arrays. As many rows as a block has are told at a time. The block's rows are written
directly behind those that count; what lies behind these is never looked at.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from specdec.draft.cache import ContextCache
from specdec.draft.config import DraftConfig
from specdec.draft.weights import DraftWeights
from specdec.kernels.array import start
from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.block_attention import block_inputs, seen_attention
from specdec.kernels.gpu.graphs import Graphs
from specdec.kernels.linear import embed, linear
from specdec.kernels.norm import Norm, swiglu
from specdec.kernels.rope import Rope
from specdec.kernels.tapped import Taps, tapped_rows
from specdec.kernels.top_tokens import top_tokens
from specdec.kernels.walked import walked
from specdec.kernels.weight import Weight

STEP = 512  # places by which a graph's reach grows: each is a graph
NOWHERE = -(2**30)  # a place before all others


class Walk(NamedTuple):
    """A verified tree whose greedy walk the device is to find.

    tree: int32, tokens of all rows, then their parents, as an array of the host or on the device;
    verdict: int32 [rows, 2], as kernels.top_tokens.
    """

    tree: np.ndarray | mx.array
    verdict: mx.array

    @property
    def on_device(self) -> bool:
        return isinstance(self.tree, mx.array)


class Drafted(NamedTuple):
    """found: int32 [slots, 2 * width + 3], as kernels.top_tokens; came: of the round that was
    walked, int32 [CAME], as kernels.walked."""

    found: mx.array
    came: mx.array | None = None


class DraftGraph:
    """The graphs of one draft."""

    def __init__(
        self,
        config: DraftConfig,
        weights: DraftWeights,
        embedding: Weight,
        rope: Rope,
        dtype: mx.Dtype,
        logits: Callable[[mx.array], mx.array],
    ) -> None:
        """logits: of hidden rows [slots, hidden]. dtype: what the draft computes in."""
        self._config, self._weights, self._embedding = config, weights, embedding
        self._rope, self._dtype, self._logits = rope, dtype, logits
        self._graphs = Graphs()
        columns = len(config.target_layer_ids) * config.hidden_size
        self._none = Taps([mx.zeros((1, columns), dtype)], ())
        eps = config.rms_norm_eps
        self._context_norm = Norm(weights.hidden_norm, eps)
        self._shapes = [
            AttentionShape(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                False,
                Norm(layer.q_norm, eps),
                Norm(layer.k_norm, eps),
            )
            for layer in weights.layers
        ]
        self._norms = [
            (Norm(layer.input_norm, eps), Norm(layer.post_norm, eps)) for layer in weights.layers
        ]

    def begin(
        self,
        caches: Sequence[ContextCache],
        length: int,
        told: Taps | None,
        bonus: int,
        width: int,
        slots: int,
        walk: Walk | None = None,
    ) -> Drafted:
        """Begin a pass after `length` known tokens and the told rows, a block's at most.

        With a walk, the rows told are its path, of the taps' parts, and the bonus token is the one
        that it finds: told has no rows, and bonus is not looked at. Keys and values of the told
        rows stand in the caches afterwards, behind their end.
        """
        config = self._config
        told = self._none if told is None else told
        count = len(told)
        rows = range(count) if told.rows is None else told.rows
        block, position = config.block_size, length + count
        more = block if walk is not None else 0  # rows that may be told
        tables, reached = [], []
        for i, cache in enumerate(caches):
            cache.make_room()
            first, last = cache.seen(position, config.causal[i])
            if walk is not None:  # as it would be if there were places below 0
                window = config.windows[i]
                row = position + np.arange(block) - cache.start
                first = row - window + 1 if window else np.full(block, NOWHERE)
            tables.append(np.stack([last - 1, last, first, np.zeros_like(first)], axis=1))
            last_place = int(last.max()) + more
            reached.append(min(-(-last_place // STEP) * STEP, cache.rows.shape[2]))
        numbers = np.concatenate(
            [
                *((walk.tree,) if walk is not None and not walk.on_device else ()),
                [count, *(length - cache.start for cache in caches)],
                [*rows, *[0] * (block - count)],  # those that do not count are any
                [bonus, *[config.mask_token_id] * config.slots],
                *(table.ravel() for table in tables),
                [length],
            ]
        ).astype(np.int32)
        buffers = tuple(cache.rows.shape[2] for cache in caches)
        shapes = len(told.parts), *told.parts[0].shape
        known = None if walk is None else walk.on_device
        kind = width, slots, *reached, buffers, shapes, told.parts[0].dtype, known
        graph = self._graphs.of(kind, partial(self._body, width, slots, reached))
        cos, sin = self._rope.run(length, 2 * block)
        found, came, rows, written = graph(
            {
                "told": list(told.parts),
                "numbers": mx.array(numbers),
                "verdict": [] if walk is None else [walk.verdict],
                "tree": [walk.tree] if walk is not None and walk.on_device else [],
                "cos": cos,
                "sin": sin,
                "rows": [cache.rows for cache in caches],
                "order": [cache.written.order for cache in caches],
            }
        )
        for cache, filled, done in zip(caches, rows, written, strict=True):
            cache.rows = filled
            if done is not None:
                cache.written.by(done)
        start(found, *rows)
        return Drafted(found, *came)

    def _body(
        self, width: int, slots: int, reached: Sequence[int], given: dict[str, Any]
    ) -> tuple[mx.array, list[mx.array], list[mx.array], list[mx.array | None]]:
        config, weights, numbers = self._config, self._weights, given["numbers"]
        block, layers = config.block_size, config.num_layers
        came = []
        for verdict in given["verdict"]:
            # the host's tree comes before its numbers
            tree = given["tree"][0] if given["tree"] else numbers
            numbers, one = walked(verdict, tree, numbers, layers, block)
            came.append(one)
        places = [numbers[1 + i : 2 + i] for i in range(layers)]
        told = tapped_rows(given["told"], numbers[1 + layers : 1 + layers + block])
        at = 1 + layers + block
        x = embed(numbers[at : at + block], self._embedding).astype(self._dtype)
        if config.input_embedding_scale != 1.0:
            x = x * config.input_embedding_scale
        at += block
        seen = [
            numbers[i : i + 4 * block].reshape(block, 4)
            for i in range(at, at + 4 * block * layers, 4 * block)
        ]
        # Not normalized again by a layer's input norm, unlike the block's rows.
        context = linear(told.astype(self._dtype), weights.fc)
        kept, written = [], []
        for i, layer in enumerate(weights.layers):
            before, after = self._norms[i]
            q, k, v = layer.qkv(x, before)
            told_k, told_v = layer.told(context, self._context_norm)
            queries, rows, done = block_inputs(
                (q, k, v),
                (told_k, told_v),
                numbers[:1],
                self._shapes[i],
                given["cos"],
                given["sin"],
                given["rows"][i],
                places[i],
                given["order"][i],
            )
            kept.append(rows)
            written.append(done)
            scale = config.head_dim**-0.5
            attended = seen_attention(queries, rows, seen[i], reached[i], scale)
            x = linear(attended, layer.o, residual=x)
            gate, up = layer.gate_up(x, after)
            x = linear(swiglu(gate.values, up.values), layer.down, residual=x)
        found = top_tokens(self._logits(x[1 : 1 + slots]), width)
        return found, came, kept, written
