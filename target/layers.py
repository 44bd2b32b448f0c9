"""Layers: the target's weights, and the way of a pass's rows through them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.errors import NonFiniteError
from specdec.kernels.array import Array, Backend, finite_rows
from specdec.kernels.linear import embed, linear
from specdec.kernels.norm import Norm
from specdec.kernels.top_tokens import verdict
from specdec.kernels.weight import Weight
from specdec.target.attention import Attention
from specdec.target.config import FULL, TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.gated_delta import GatedDelta
from specdec.target.layer_clock import LayerClock
from specdec.target.manifest import Manifest
from specdec.target.mlp import MLP, MoE
from specdec.target.passes import Pass, TreePass
from specdec.target.tensors import Tensors


@dataclass(frozen=True, eq=False)
class Layer:
    """Two halves, each with its norm, each adding to the residual."""

    mixer: Attention | GatedDelta
    mlp: MLP | MoE


class Layers:
    """All of them in order, between embedding and head; `taps` are those whose output is kept."""

    def __init__(
        self,
        config: TargetConfig,
        layers: list[Layer],
        embedding: Weight,
        norm: Norm,
        head: Weight,
        backend: Backend,
        taps: Sequence[int],
    ) -> None:
        assert all(0 <= tap < config.num_layers for tap in taps)
        self.config, self.all, self.backend, self.taps = config, layers, backend, tuple(taps)
        self.embedding, self.norm, self.head = embedding, norm, head
        self.clock: LayerClock | None = None  # set to time the halves of every layer

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: TargetConfig,
        experts: ExpertCache,
        backend: Backend,
        taps: Sequence[int] = (),
    ) -> Self:
        """Read all weights but the experts; CheckpointError as the manifest says."""
        manifest = Manifest.of(checkpoint, config)
        root = Tensors(checkpoint, manifest, config.prefix, backend)
        layers: list[Layer] = []
        for i, kind in enumerate(config.layer_types):
            tensors = root.under(f"layers.{i}")
            mixer: Attention | GatedDelta
            mlp: MLP | MoE
            norms = [
                Norm(tensors.array(f"{name}_layernorm.weight"), config.rms_norm_eps)
                for name in ("input", "post_attention")
            ]
            if kind == FULL:
                at = config.full_layers.index(i)
                mixer = Attention(tensors.under("self_attn"), norms[0], config, at)
            else:
                at = config.linear_layers.index(i)
                mixer = GatedDelta(tensors.under("linear_attn"), norms[0], config, at)
            if i in config.dense_layers:
                mlp = MLP(tensors.under("mlp"), norms[1])
            else:
                mlp = MoE(tensors.under("mlp"), norms[1], config, i, experts)
            layers.append(Layer(mixer, mlp))
        embedding = root.weight("embed_tokens")
        head = embedding
        if not config.tie_word_embeddings:
            head = Tensors(checkpoint, manifest, config.head_prefix, backend).weight("lm_head")
        norm = Norm(root.array("norm.weight"), config.rms_norm_eps)
        return cls(config, layers, embedding, norm, head, backend, taps)

    @property
    def moe(self) -> list[MoE]:
        """The MoE halves, in order."""
        return [layer.mlp for layer in self.all if isinstance(layer.mlp, MoE)]

    def verify(self, tokens: Array, this: TreePass) -> tuple[Any, ...]:
        """Logits, taps, and which rows of the logits are finite, on a GPU as a verdict."""
        return self.part(range(len(self.all)), tokens, {}, this)

    def part(
        self, span: range, x: Array, tapped: dict[int, Array], this: TreePass
    ) -> tuple[Any, ...]:
        """Some layers of a verify pass. x: tokens for the first, then what the part before gave:
        hidden rows and what was tapped so far; the last part gives what `verify` does."""
        if span.start == 0:
            x = embed(x, self.embedding)
        x, tapped = self._through(span, x, tapped, this)
        if span.stop < len(self.all):
            return x, tapped
        logits = self.logits(x)
        found = (verdict if self.backend.on_gpu else finite_rows)(logits)
        return logits, self._tapped(x, tapped), found

    def forward(self, tokens: Array, this: Pass, probe: bool = False) -> tuple:
        """Hidden rows after the last layer and after each tapped one, [rows, hidden] each.

        With `probe`, every layer's output is checked, and NonFiniteError names the first bad one.
        """
        x = embed(tokens, self.embedding)
        if probe and not finite_rows(x).all():
            raise NonFiniteError("NaN or Inf in the token embeddings")
        x, tapped = self._through(range(len(self.all)), x, {}, this, probe)
        return x, self._tapped(x, tapped)

    def _through(
        self, span: range, x: Array, tapped: dict[int, Array], this: Pass, probe: bool = False
    ) -> tuple[Array, dict[int, Array]]:
        """Hidden rows after the layers of `span`, and `tapped` with what they add."""
        tapped = dict(tapped)
        for i in span:
            layer = self.all[i]
            if self.clock is not None:
                self.clock.start(x)
            x = layer.mixer(x, this)
            if self.clock is not None:
                self.clock.mixed(i, x)
            if probe and not finite_rows(x).all():
                raise NonFiniteError(
                    f"NaN or Inf first appears in layer {i} ({self.config.layer_types[i]})"
                )
            x = layer.mlp(x, this)
            if self.clock is not None:
                self.clock.fed(i, x)
            if probe and not finite_rows(x).all():
                raise NonFiniteError(f"NaN or Inf first appears in layer {i} (feed-forward)")
            if i in self.taps:
                tapped[i] = x
        return x, tapped

    def _tapped(self, x: Array, tapped: dict[int, Array]) -> list[Array]:
        return [tapped[i] for i in self.taps] or [x[:, :0]]

    def logits(self, hidden: Array) -> Array:
        """[rows, hidden] -> [rows, vocab]."""
        return linear(hidden, self.head, self.norm)

    def refuse(self, tokens: np.ndarray, this: Pass) -> NoReturn:
        """Say where NaN or Inf began, by running a pass again; nothing of it is committed."""
        self.forward(tokens, this.again(), probe=True)
        raise NonFiniteError("NaN or Inf first appears in the logits (final norm or head)")
