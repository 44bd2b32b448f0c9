"""Random layers with experts, and what they should give: float64 products of decoded matrices."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.gpu.experts import (
    combine,
    experts_apart,
    feed_forward,
    shared_hidden,
)
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing
from specdec.kernels.weight import Weight
from tests.kernels.weights import normal, some_weight
from tests.metal.run import through_shim

Q4 = (4, 64)
EPS = 1e-5


def floats(weight, dtype):
    """The weight with its floats in another type."""
    if weight.scales is None:
        return Weight(weight.data.astype(dtype))
    scales, biases = weight.scales.astype(dtype), weight.biases.astype(dtype)
    return Weight(weight.data, scales, biases, weight.bits, weight.group_size)


def matrix_of(weight):
    if weight.scales is None:
        return np.array(weight.data.astype(mx.float32), np.float64)
    weight = floats(weight, mx.float32)
    packing = weight.group_size, weight.bits
    return np.array(mx.dequantize(weight.data, weight.scales, weight.biases, *packing), np.float64)


@dataclass
class Layer:
    """A random layer; the slots of its bank are in another order than its experts."""

    norm: Norm
    bank: ExpertWeights
    table: mx.array
    shared: SharedExpert | None
    dtype: mx.Dtype

    @classmethod
    def random(
        cls,
        seed=0,
        hidden=128,
        inner=64,
        experts=8,
        packing=Q4,
        down=None,
        shared=(8, 64),
        shared_inner=128,
        dtype=mx.float32,
    ):
        rng = np.random.default_rng(seed)

        def weight(*shape, packing):
            return floats(some_weight(rng, *shape, packing=packing)[0], dtype)

        def matrices(*stack, inner, packing, down):
            return (
                weight(*stack, inner, hidden, packing=packing),
                weight(*stack, inner, hidden, packing=packing),
                weight(*stack, hidden, inner, packing=down),
            )

        bank = matrices(experts, inner=inner, packing=packing, down=down or packing)
        table = mx.array(rng.permutation(experts).astype(np.int32))
        same = {"packing": shared, "down": shared}
        alone = None if shared == "none" else SharedExpert(*matrices(inner=shared_inner, **same))
        norm = Norm(mx.array(1 + 0.1 * normal(rng, hidden)).astype(dtype), EPS)
        return cls(norm, ExpertWeights(*bank), table, alone, dtype)

    def inputs(self, rows, top_k, seed=1):
        """x, experts, weights, and rows of which column 3 is the shared expert's gate."""
        rng = np.random.default_rng(seed)
        x = mx.array(normal(rng, rows, self.norm.weight.size)).astype(self.dtype)
        count = self.table.size
        experts = np.stack([rng.permutation(count)[:top_k] for _ in range(rows)]).astype(np.int32)
        weights = rng.random((rows, top_k)).astype(np.float32)
        return x, experts, weights, mx.array(normal(rng, rows, 5)).astype(self.dtype)

    def routing(self, experts, weights):
        rows, top_k = experts.shape
        entries = []
        for expert in np.unique(experts):
            mask = sum(1 << row for row in range(rows) if expert in experts[row])
            entries.append([expert, mask - (mask >> 31 << 32)])
        entries += [[-1, 0]] * (min(rows * top_k, self.table.size) - len(entries))
        union = mx.array(np.array(entries, np.int32))
        return Routing(mx.array(experts), mx.array(weights), union)

    def forward(self, x, experts, weights, gate, **options):
        piece = None if self.shared is None else Piece(gate, 3, 1)
        routing = self.routing(experts, weights)
        with through_shim(**options):
            return feed_forward(x, self.norm, self.bank, routing, self.table, self.shared, piece)

    def waves(self, x, experts, weights, **options):
        """The outputs of streamed experts that come in two waves, of each wave."""
        routing, table = self.routing(experts, weights), np.array(self.table)
        for resident in (np.arange(8) < 5, np.arange(8) >= 5):
            slots = mx.array(np.where(resident, table, -1).astype(np.int32))
            with through_shim(**options):
                wave = experts_apart(x, self.norm, self.bank, routing, slots)
            assert wave.dtype == mx.float32
            elsewhere = ~resident[experts]
            assert elsewhere.any()
            assert not np.array(wave)[elsewhere].any()
            yield wave

    def combined(self, x, apart, routing, gate, **options):
        """What the waves add up to, with the shared expert."""
        piece = None if self.shared is None else Piece(gate, 3, 1)
        with through_shim(**options):
            hidden = None if self.shared is None else shared_hidden(x, self.norm, self.shared)
            return combine(x, apart, routing, self.shared, hidden, piece)

    def forward64(self, x, experts, weights, gate, rounded=lambda values: values):
        """The result and the experts' outputs; rounded: what is done where matrix units round."""
        x, gate = (np.array(a.astype(mx.float32), np.float64) for a in (x, gate))
        mean = (x**2).mean(1, keepdims=True)
        norm = np.array(self.norm.weight.astype(mx.float32), np.float64)
        h, scale = rounded(x * norm), 1 / np.sqrt(mean + EPS)
        stacks = [matrix_of(w) for w in (self.bank.gate, self.bank.up, self.bank.down)]
        slots = np.array(self.table)[experts]
        apart = np.empty((*experts.shape, x.shape[1]))
        for row, rank in np.ndindex(*experts.shape):
            matrices = [s[slots[row, rank]] for s in stacks]
            apart[row, rank] = expert64(h[row], scale[row], matrices, rounded)
        y = x + np.einsum("rkh,rk->rh", apart, weights.astype(np.float64))
        if self.shared is not None:
            alone = [matrix_of(w) for w in (self.shared.gate, self.shared.up, self.shared.down)]
            sigmoid = 1 / (1 + np.exp(-gate[:, 3:4]))
            each = zip(h, scale, strict=True)
            y = y + sigmoid * np.stack([expert64(*row, alone, rounded) for row in each])
        return y, apart


def expert64(h, scale, matrices, rounded):
    gate, up, down = matrices
    inner = gate @ h * scale
    return down @ rounded(inner / (1 + np.exp(-inner)) * (up @ h * scale))


def exact(array):
    return np.array(array.astype(mx.float32))
