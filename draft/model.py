"""Draft: a DFlash block-diffusion draft (Chen et al. 2026, as z-lab publishes it).

One pass over a block [bonus token, mask, mask, ...] gives the distributions of all the positions
after the bonus token at once. What the draft knows of the text are the target's hidden states: the
outputs of some target layers (taps) are fused into one row per committed token, and every draft
layer attends to keys and values made from those rows. Embedding and head are the target's.

P tokens are committed: their keys stand at positions 0 to P-1, the block at P (the bonus token,
which the target has not processed yet) to P+B-1, and slot k predicts the token at position P+k.

The residual stream is float32 or bfloat16, never float16: sums in it reach 3e6 in trained drafts,
float16 ends at 65504, and the overflow costs all acceptance without an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx
import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.draft.cache import ContextCache
from specdec.draft.candidates import as_block, top_candidates
from specdec.draft.config import DraftConfig
from specdec.draft.graph import Drafted, DraftGraph, Walk
from specdec.draft.weights import DraftWeights, LayerWeights
from specdec.errors import NonFiniteError
from specdec.kernels.array import Array, Backend, finite_rows, is_numpy, start, to_numpy
from specdec.kernels.attention_inputs import AttentionShape, attention_inputs
from specdec.kernels.block_attention import block_attention
from specdec.kernels.gpu.limits import MAX_ROWS
from specdec.kernels.linear import embed, linear
from specdec.kernels.norm import Norm, rms_norm, swiglu
from specdec.kernels.rope import Rope, rotate
from specdec.kernels.tapped import Taps
from specdec.kernels.weight import Weight
from specdec.tree.block import Block


@dataclass(frozen=True, eq=False)
class Begun:
    """A pass that was begun: with which rows, None once they are known to be committed; what was
    asked, bonus token, width and slots; the answer."""

    told: Taps | None
    asked: tuple[int, int, int | None]
    answer: Drafted

    @property
    def walked(self) -> bool:
        """Then the path and the bonus token are those of the walk, whichever they are."""
        return self.answer.came is not None

    def tells(self, taps: Taps) -> bool:
        """Whether it was begun with these rows."""
        same = self.told is not None and taps.parts is self.told.parts
        return same and (self.walked or taps is self.told)

    def answers(self, bonus: int, width: int, slots: int | None) -> bool:
        """Whether this is what was asked, and its rows are known to be committed."""
        same = self.asked == (self.asked[0] if self.walked else bonus, width, slots)
        return same and self.told is None


class Draft:
    """A loaded draft and its context: what it has been told about the committed tokens."""

    def __init__(
        self,
        config: DraftConfig,
        weights: DraftWeights,
        embedding: Weight,
        head: Weight,
        backend: Backend,
        position_shift: int = 0,
    ) -> None:
        """embedding, head: the target's [vocab, hidden]; all weights as the backend holds them.

        position_shift moves the block against its context; only the doctor has a use for it.
        """
        if backend.dtype not in (mx.float32, mx.bfloat16):
            raise ValueError(f"draft dtype {backend.dtype}, expected float32 or bfloat16")
        self.config, self.weights, self.backend = config, weights, backend
        self.embedding, self.head = embedding, head
        self._shift = position_shift
        self._rope = Rope(config.rope)
        self._graph: DraftGraph | None = None
        if backend.on_gpu and position_shift == 0 and config.block_size <= MAX_ROWS:
            self._graph = DraftGraph(
                config, weights, embedding, self._rope, backend.dtype, self._logits
            )
        self.reset()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: DraftConfig,
        embedding: Weight,
        head: Weight,
        backend: Backend,
    ) -> Self:
        """Read the weights. CheckpointError on a missing, surplus or misshapen tensor."""
        weights = DraftWeights.load(checkpoint, config, backend)
        return cls(config, weights, embedding, head, backend)

    def reset(self) -> None:
        """Forget all tokens."""
        config = self.config
        self._length = 0
        self._waiting: Taps | None = None  # to be told with the next proposal
        self._begun: Begun | None = None
        self._caches = [
            ContextCache(
                config.num_kv_heads, config.head_dim, config.block_size, window, self.backend
            )
            for window in config.windows
        ]

    @property
    def length(self) -> int:
        """Committed tokens the draft knows of: P, the position of the next bonus token."""
        return self._length + (0 if self._waiting is None else len(self._waiting))

    @property
    def compiled(self) -> bool:
        """Whether passes are graphs, for which rows are told with the proposal that follows."""
        return self._graph is not None

    def extend(self, taps: Array | Taps) -> None:
        """Add newly committed tokens: taps [n, taps * hidden], a row each, in order.

        In one call or in many, the context is the same. The work is started, not waited for.
        """
        begun = self._begun
        if begun is not None and isinstance(taps, Taps) and begun.tells(taps):
            self._know(len(taps))
            self._begun = replace(begun, told=None)
            return
        self._begun = None
        if self._waiting is not None:
            self._extend(self._waiting.values)
            self._waiting = None
        taps = taps if isinstance(taps, Taps) else Taps([taps])
        if self.compiled and len(taps) <= self.config.block_size:
            self._waiting = taps
        else:
            self._extend(taps.values)

    def look_ahead(self, taps: Taps, bonus: int, width: int, slots: int | None = None) -> None:
        """Begin what `extend(taps)` and then `propose(bonus, width, slots)` will ask for.

        If they never do, nothing is lost. Only where passes are compiled.
        """
        assert self._waiting is None
        self._begun = None
        self._begun = self._begin(taps, bonus, width, slots)

    def look_past(self, tapped: Sequence[Array], walk: Walk, width: int, slots: int) -> Drafted:
        """`look_ahead` for the taps of the walk's path and its bonus token, before the host knows
        either: tapped, of all rows of the tree. What will be `answer`, and what came of the walk.
        """
        assert self._waiting is None
        self._begun = None
        self._begun = self._begin(Taps(tapped, ()), 0, width, slots, walk)
        return self._begun.answer

    def _extend(self, taps: Array) -> None:
        config, weights, count = self.config, self.weights, len(taps)
        assert taps.shape == (count, len(config.target_layer_ids) * config.hidden_size)
        # Not normalized again by a layer's input norm, unlike the block's rows.
        context = linear(self._cast(taps), weights.fc)
        norm = Norm(weights.hidden_norm, config.rms_norm_eps)
        cos, sin = self._turn(self._length, count, context)
        for layer, cache in zip(weights.layers, self._caches, strict=True):
            first = count - cache.rows_to_keep(count)
            keys = values = cache.rows[0, :, :0]
            if first < count:  # a window of one row sees no other
                turn = cos[first:], sin[first:]
                keys, values = self._keys_values(layer, norm, context[first:], turn)
            cache.append(keys, values, self._length + first)
        start(*(cache.rows for cache in self._caches))
        self._length += count  # last: after an error the same rows can be given again

    def propose(self, bonus: int, width: int, slots: int | None = None) -> Block:
        """Draft the block after the bonus token: block_size - 1 slots of the `width` best tokens.

        slots: how many of the first are wanted, None for all; the others have no logits computed.
        Changes nothing. NonFiniteError, naming the layer, on NaN or Inf.
        """
        try:
            if self.compiled:
                return as_block(to_numpy(self.answer(bonus, width, slots)))
            return top_candidates(self._logits(self._forward(bonus)[:slots]), width)
        except NonFiniteError:
            self.probe(bonus)
            raise

    def probe(self, bonus: int) -> None:
        """NonFiniteError, naming the layer, where NaN or Inf first appears in a proposal."""
        self._forward(bonus, probe=True)

    def answer(self, bonus: int, width: int, slots: int | None = None) -> mx.array:
        """What `propose` finds, as kernels.top_tokens gives it: begun, maybe long ago, and not
        waited for. Only where passes are compiled."""
        begun, self._begun = self._begun, None
        if begun is None or not begun.answers(bonus, width, slots):
            begun = self._begin(self._waiting, bonus, width, slots)
            self._know(0 if self._waiting is None else len(self._waiting))
        return begun.answer.found

    def _begin(
        self,
        told: Taps | None,
        bonus: int,
        width: int,
        slots: int | None,
        walk: Walk | None = None,
    ) -> Begun:
        assert self._graph is not None
        config = self.config
        found = self._graph.begin(
            self._caches,
            self._length,
            told,
            bonus,
            min(width, config.vocab_size),
            config.slots if slots is None else min(slots, config.slots),
            walk,
        )
        return Begun(told, (bonus, width, slots), found)

    def _know(self, count: int) -> None:
        """Rows that a graph told the caches of are committed."""
        for cache in self._caches:
            cache.end = self._length + count
        self._length, self._waiting = self._length + count, None

    def _forward(self, bonus: int, probe: bool = False) -> Array:
        """Hidden rows of the slots after the last layer: [slots, hidden].

        With `probe`, every layer's output is checked, and NonFiniteError names the first bad one.
        """
        config = self.config
        tokens = [bonus] + [config.mask_token_id] * config.slots
        x = self._cast(embed(np.array(tokens, np.int32), self.embedding))
        if config.input_embedding_scale != 1.0:
            x = x * config.input_embedding_scale
        turn = self._turn(self._length + self._shift, config.block_size, x)
        for i, (layer, cache) in enumerate(zip(self.weights.layers, self._caches, strict=True)):
            x = self._attend(x, layer, cache, config.causal[i], turn)
            norm = Norm(layer.post_norm, config.rms_norm_eps)
            gate, up = layer.gate_up(x, norm)
            x = linear(swiglu(gate.values, up.values), layer.down, residual=x)
            if probe and not finite_rows(x).all():
                raise NonFiniteError(f"NaN or Inf first appears in layer {i} of the draft")
        return x[1:]

    def _attend(
        self,
        x: Array,
        layer: LayerWeights,
        cache: ContextCache,
        causal: bool,
        turn: tuple[Array, Array],
    ) -> Array:
        """x [block, hidden] plus its attention to the context and to the block itself."""
        config = self.config
        q, k, v = layer.qkv(x, Norm(layer.input_norm, config.rms_norm_eps))
        queries, keys, values = attention_inputs(q, k, v, self._shape(layer), *turn)
        keys, values = cache.with_block(keys, values)
        first, last = cache.seen(self._length, causal)
        scale = config.head_dim**-0.5
        attended = block_attention(queries, keys, values, first, last, scale)
        attended = attended.swapaxes(0, 1).reshape(x.shape[0], -1)
        return linear(attended, layer.o, residual=x)

    def _keys_values(
        self, layer: LayerWeights, norm: Norm, rows: Array, turn: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """Keys, normalized and rotated, and values of norm(rows) for rows [n, hidden]: each
        [kv_heads, n, head_dim]."""
        config = self.config
        keys, values = (
            self._heads(piece.values, config.num_kv_heads) for piece in layer.told(rows, norm)
        )
        keys = rms_norm(keys, layer.k_norm, config.rms_norm_eps)
        return rotate(keys, *turn), values

    def _shape(self, layer: LayerWeights) -> AttentionShape:
        config, eps = self.config, self.config.rms_norm_eps
        norms = Norm(layer.q_norm, eps), Norm(layer.k_norm, eps)
        return AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, False, *norms)

    def _heads(self, rows: Array, heads: int) -> Array:
        """[n, heads * head_dim] -> [heads, n, head_dim]."""
        return rows.reshape(-1, heads, self.config.head_dim).swapaxes(0, 1)

    def _turn(self, first: int, count: int, like: Array) -> tuple[Array, Array]:
        """cos and sin of the positions from `first` on, for all layers."""
        return self._rope.rows(np.arange(first, first + count), like)

    def _logits(self, hidden: Array) -> Array:
        """[slots, hidden] -> [slots, vocab]."""
        config = self.config
        norm: Norm | None = Norm(self.weights.norm, config.rms_norm_eps)
        # The target may run in another dtype than the draft.
        floats = self.head.data if self.head.scales is None else self.head.scales
        if is_numpy(hidden) or hidden.dtype != floats.dtype:
            hidden = rms_norm(hidden, self.weights.norm, config.rms_norm_eps).astype(floats.dtype)
            norm = None
        logits = linear(hidden, self.head, norm)
        if config.output_multiplier != 1.0:
            logits = logits * config.output_multiplier
        if config.final_logit_softcapping:
            cap = config.final_logit_softcapping
            logits = cap * (np if is_numpy(logits) else mx).tanh(logits / cap)
        return logits

    def _cast(self, x: Array) -> Array:
        """x in the dtype the draft computes in."""
        return x.astype(np.float32 if is_numpy(x) else self.backend.dtype)
