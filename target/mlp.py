"""MLP and MoE: the feed-forward half of a layer, plain or routed to experts."""

import numpy as np

from specdec.kernels.array import Array, concatenate, evaluate, to_numpy
from specdec.kernels.experts import ExpertWeights, combine, experts_apart
from specdec.kernels.linear import Projections, linear
from specdec.kernels.norm import sigmoid_gate, swiglu
from specdec.kernels.routing import route
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.passes import Pass
from specdec.target.tensors import Tensors


class MLP:
    """down(silu(gate x) * up x)."""

    def __init__(self, tensors: Tensors) -> None:
        self.gate_up = Projections([tensors.weight("gate_proj"), tensors.weight("up_proj")])
        self.down = tensors.weight("down_proj")

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] -> [rows, hidden]."""
        gate, up = self.gate_up(x)
        return linear(swiglu(gate, up), self.down)


class MoE:
    """Routed experts, and a shared one where the model has it."""

    def __init__(
        self, tensors: Tensors, config: TargetConfig, layer: int, experts: ExpertCache
    ) -> None:
        self.layer, self.experts, self.backend = layer, experts, tensors.backend
        # The bank's memory stays where it is; only what it holds changes.
        self.bank: ExpertWeights = experts.bank(layer).on(tensors.backend)
        self.top_k, self.normalize = config.top_k, config.norm_topk_prob
        gates = [tensors.weight("gate")]
        self.shared = None
        if config.shared_intermediate_size:
            gates.append(tensors.weight("shared_expert_gate"))
            self.shared = MLP(tensors.under("shared_expert"))
        self.gates = Projections(gates)

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] -> [rows, hidden]."""
        logits, *shared_gate = self.gates(x)
        chosen, weights = route(logits, self.top_k, self.normalize)
        this.chosen[self.layer] = chosen
        if self.experts.is_pinned(self.layer):
            # A pinned layer's bank holds expert e in slot e: no read-back of the routing.
            outputs = experts_apart(x, self.bank, chosen)
        else:
            outputs = self._streamed(x, to_numpy(chosen))
        y = combine(outputs, weights)
        if self.shared is not None:
            y = y + sigmoid_gate(self.shared(x, this), shared_gate[0])
        return y

    def _streamed(self, x: Array, chosen: np.ndarray) -> Array:
        """experts_apart for a layer whose experts come and go: [rows, top_k, hidden].

        Each (row, expert) pair is computed in the wave that has the expert; one wave if all fit.
        """
        flat = chosen.reshape(-1)
        order, parts = [], []
        for wave in self.experts.waves(self.layer, flat):
            slots = wave.table[flat]
            pairs = np.flatnonzero(slots >= 0)
            if len(pairs) == len(flat):
                return experts_apart(x, self.bank, wave.table[chosen])
            rows = self.backend.index(pairs // self.top_k)
            parts.append(experts_apart(x[rows], self.bank, slots[pairs, None])[:, 0])
            order.append(pairs)
            evaluate(parts[-1])  # before the next wave overwrites the slots
        back = self.backend.index(np.argsort(np.concatenate(order)))
        return concatenate(parts)[back].reshape(*chosen.shape, -1)
