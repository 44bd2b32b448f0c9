"""MLP and MoE: the feed-forward half of a layer, plain or routed to experts."""

import mlx.core as mx
import numpy as np

from specdec.kernels.experts import combine, experts_apart
from specdec.kernels.linear import Projections, linear
from specdec.kernels.norm import swiglu
from specdec.kernels.routing import route
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.passes import Pass
from specdec.target.tensors import Tensors


class MLP:
    """down(silu(gate x) * up x)."""

    def __init__(self, tensors: Tensors, hidden: int, intermediate: int) -> None:
        self.gate_up = Projections(
            [
                tensors.weight("gate_proj", intermediate, hidden),
                tensors.weight("up_proj", intermediate, hidden),
            ]
        )
        self.down = tensors.weight("down_proj", hidden, intermediate)

    def __call__(self, x: mx.array, this: Pass) -> mx.array:
        """x [rows, hidden] -> [rows, hidden]."""
        gate, up = self.gate_up(x)
        return linear(swiglu(gate, up), self.down)


class MoE:
    """Routed experts, and a shared one where the model has it."""

    def __init__(
        self, tensors: Tensors, config: TargetConfig, layer: int, experts: ExpertCache
    ) -> None:
        self.layer, self.experts = layer, experts
        self.top_k, self.normalize = config.top_k, config.norm_topk_prob
        hidden = config.hidden_size
        gates = [tensors.weight("gate", config.num_experts, hidden)]
        self.shared = None
        if config.shared_intermediate_size:
            gates.append(tensors.weight("shared_expert_gate", 1, hidden))
            self.shared = MLP(
                tensors.under("shared_expert"), hidden, config.shared_intermediate_size
            )
        self.gates = Projections(gates)

    def __call__(self, x: mx.array, this: Pass) -> mx.array:
        """x [rows, hidden] -> [rows, hidden]."""
        logits, *shared_gate = self.gates(x)
        chosen, weights = route(logits, self.top_k, self.normalize)
        if self.experts.is_pinned(self.layer):
            # A pinned layer's bank holds expert e in slot e: no read-back of the routing.
            outputs = experts_apart(x, self.experts.bank(self.layer), chosen)
        else:
            outputs = self._streamed(x, np.array(chosen))
            this.used_experts(self.layer, np.array(chosen))
        y = combine(outputs, weights)
        if self.shared is not None:
            y = y + mx.sigmoid(shared_gate[0]) * self.shared(x, this)
        return y

    def _streamed(self, x: mx.array, chosen: np.ndarray) -> mx.array:
        """experts_apart for a layer whose experts come and go: [rows, top_k, hidden]."""
        waves = iter(self.experts.waves(self.layer, np.unique(chosen)))
        bank, table, wave = next(waves)
        if len(wave) == len(np.unique(chosen)):
            return experts_apart(x, bank, mx.array(table[chosen]))
        flat = chosen.reshape(-1)
        order, parts = [], []
        while True:
            pairs = np.flatnonzero(np.isin(flat, wave))
            rows = mx.array(pairs // self.top_k)
            part = experts_apart(x[rows], bank, mx.array(table[flat[pairs]])[:, None])[:, 0]
            mx.eval(part)  # before the next wave overwrites the slots
            order.append(pairs)
            parts.append(part)
            try:
                bank, table, wave = next(waves)
            except StopIteration:
                break
        back = np.argsort(np.concatenate(order))
        return mx.concatenate(parts)[mx.array(back)].reshape(*chosen.shape, -1)
