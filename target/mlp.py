"""MLP and MoE: the feed-forward half of a layer, plain or routed to experts."""

from collections.abc import Callable

import numpy as np

from specdec.kernels.array import Array, evaluate, start, to_numpy
from specdec.kernels.experts import (
    ExpertWeights,
    SharedExpert,
    combine,
    experts_apart,
    feed_forward,
    shared_hidden,
)
from specdec.kernels.linear import Piece, Projections, linear
from specdec.kernels.norm import Norm, swiglu
from specdec.kernels.routing import Routing, route
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.passes import Pass
from specdec.target.prefetch import Prefetcher
from specdec.target.tensors import Tensors
from specdec.target.tolerance import Tolerance


class MLP:
    """x + down(silu(gate h) * up h), h = norm(x)."""

    def __init__(self, tensors: Tensors, norm: Norm) -> None:
        self.norm = norm
        self.gate_up = Projections([tensors.weight("gate_proj"), tensors.weight("up_proj")])
        self.down = tensors.weight("down_proj")

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] -> [rows, hidden]."""
        gate, up = self.gate_up(x, self.norm)
        return linear(swiglu(gate.values, up.values), self.down, residual=x)


class MoE:
    """x plus its routed experts, and a shared one where the model has it, for norm(x)."""

    def __init__(
        self, tensors: Tensors, norm: Norm, config: TargetConfig, layer: int, experts: ExpertCache
    ) -> None:
        self.norm, self.layer, self.experts = norm, layer, experts
        self.backend = tensors.backend
        # The bank's memory stays where it is; only what it holds changes.
        self.bank: ExpertWeights = experts.bank(layer).on(tensors.backend)
        self.top_k, self.normalize = config.top_k, config.norm_topk_prob
        gates = [tensors.weight("gate")]
        self.shared = None
        if config.shared_intermediate_size:
            gates.append(tensors.weight("shared_expert_gate"))
            parts = (f"shared_expert.{part}_proj" for part in ("gate", "up", "down"))
            self.shared = SharedExpert(*map(tensors.weight, parts))
        self.gates = Projections(gates)
        # A pinned layer's bank holds expert e in slot e: no read-back of the routing.
        self.all_resident = None
        self.tolerance: Tolerance | None = None
        self.ahead: tuple[Prefetcher, MoE] | None = None
        if experts.is_pinned(layer):
            self.all_resident = self.backend.index(np.arange(config.num_experts, dtype=np.int32))

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] -> [rows, hidden]."""
        logits, *gates = self.gates(x, self.norm)
        routing = route(logits, self.top_k, self.normalize, x, self.norm)
        shared_gate = gates[0] if gates else None
        if self.all_resident is None:
            if self.tolerance is not None:
                resident = self.experts.resident(self.layer)
                routing = self.tolerance(self.layer, logits.values, routing, resident)
            return self._streamed(x, routing, shared_gate, this)
        this.chosen[self.layer] = routing.experts
        return feed_forward(
            x, self.norm, self.bank, routing, self.all_resident, self.shared, shared_gate
        )

    def look_ahead(self, prefetcher: Prefetcher, following: "MoE") -> None:
        """From now on tell the prefetcher what the next unpinned layer may need."""
        self.ahead = prefetcher, following

    def _streamed(self, x: Array, routing: Routing, gate: Piece | None, this: Pass) -> Array:
        """For a layer whose experts come and go: at once if all that the rows need are there. Else
        each (row, expert) pair in the wave that has the expert, while the next one is read; what
        the shared expert can do without its gate comes first."""
        foreseen = self._foreseen(x, routing)
        chosen = this.chosen[self.layer] = to_numpy(routing.experts)
        self.experts.count_synchronization(self.layer)
        apart = hidden = None
        for wave in self.experts.waves(self.layer, chosen.reshape(-1)):
            if foreseen is not None and not wave.fleeting:
                foreseen()  # after this layer's own reads have begun, so that they come first
                foreseen = None
            there = wave.table[chosen] >= 0
            table = self.backend.index(wave.table)
            if apart is hidden is None and there.all():
                return feed_forward(x, self.norm, self.bank, routing, table, self.shared, gate)
            if self.shared is not None and hidden is None:
                hidden = shared_hidden(x, self.norm, self.shared, routing)
                start(hidden)
            if not there.any():
                continue
            part = experts_apart(x, self.norm, self.bank, routing, table)
            apart = part if apart is None else apart + part
            if wave.fleeting:
                evaluate(apart)
                self.experts.count_synchronization(self.layer)
            else:
                start(apart)
        return combine(x, apart, routing, self.shared, hidden, gate)

    def _foreseen(self, x: Array, routing: Routing) -> Callable[[], None] | None:
        """Tells the prefetcher which experts the next unpinned layer would choose for x [rows,
        hidden] as it is. They are computed together with this layer's routing, so that nobody
        waits twice."""
        if self.ahead is None or not self.ahead[0].looks_ahead():
            return None
        prefetcher, after = self.ahead
        logits = after.gates(x, after.norm)[0]
        experts = route(logits, after.top_k, after.normalize).experts
        evaluate(routing.experts, experts)
        return lambda: prefetcher.guess(after.layer, to_numpy(experts))
