"""Rotary position embedding: default, linear and YaRN frequencies, read from a model's config.

NeoX layout: dimension i of the first `dim` turns together with dimension i + dim/2. The frequencies
are computed in float64 on the host and the rotation is elementwise in float32, so a row's result
depends on its own values and its own position and on nothing else: not on the other rows, their
number or their order. (A fused rope with one offset per batch would not give that for a tree.)

Refuses every other kind of scaling (dynamic, longrope, llama3, ...): a wrong frequency is silent,
the model goes on talking and a draft's acceptance drops to nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np

from specdec.errors import CheckpointError
from specdec.kernels.array import Array, OnCpu, is_numpy
from specdec.kernels.gpu.resident import resident

cpu = OnCpu("rope")

_TABLE_STEP = 256  # positions per growth of the table; see Rope._grow
LONGEST_RUN = 64  # of a tree grown behind a path of a whole block: 31 slots, 32 rows, the root


@dataclass(frozen=True)
class RopeConfig:
    """What a config says about positions.

    dim: rotated dimensions of a head (the first ones), even.
    factor: context extension; 1 for rope_type "default".
    original_max_position: length the frequencies were trained at (YaRN only, else unused).
    attention_factor: explicit scale of cos and sin; None derives it from factor and mscale.
    truncate: round YaRN's correction range outwards to whole dimensions.
    """

    dim: int
    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        assert self.rope_type in ("default", "linear", "yarn")
        assert self.dim > 0
        assert self.dim % 2 == 0
        assert self.theta > 1.0
        assert self.factor > 0.0
        assert self.rope_type != "yarn" or self.original_max_position > 0

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], head_dim: int, source: str = "config.json"
    ) -> Self:
        """Read rope_theta with rope_scaling, or rope_parameters, from a model's config.json.

        Either may stand at the top level or in `text_config`; the kind is under "rope_type" or
        "type"; partial_rotary_factor may stand beside or inside; what is inside wins. "mrope"
        (and mrope_section) is the default kind as long as every token is text. Raises
        CheckpointError for a missing theta, an unknown kind or numbers out of range; it names
        `source`.
        """
        try:
            text = config.get("text_config") or {}
            if not isinstance(text, Mapping):
                raise CheckpointError(f"text_config is {text!r}, expected an object")
            return cls._read({**config, **text}, head_dim)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None

    @classmethod
    def _read(cls, config: dict[str, Any], head_dim: int) -> Self:
        inner = _scaling(config)
        kind = inner.get("rope_type") or inner.get("type") or "default"
        if kind == "mrope":
            kind = "default"
        if kind not in ("default", "linear", "yarn"):
            raise CheckpointError(
                f"rope type {kind!r} is not supported, expected default, linear, yarn or mrope"
            )
        theta = _number(inner.get("rope_theta", config.get("rope_theta")), "rope_theta", 1.0)
        partial = _first(
            inner.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0
        )
        dim = int(head_dim * _number(partial, "partial_rotary_factor", 0.0))
        if dim < 2 or dim % 2 or dim > head_dim:
            raise CheckpointError(
                f"partial_rotary_factor {partial} of head_dim {head_dim} rotates "
                f"{dim} dimensions, expected an even number from 2 to {head_dim}"
            )
        if kind == "default":
            return cls(dim, theta)

        original, longest = 0, config.get("max_position_embeddings")
        if kind == "yarn":
            original = int(
                _number(
                    _first(
                        inner.get("original_max_position_embeddings"),
                        config.get("original_max_position_embeddings"),
                        longest,
                    ),
                    "original_max_position_embeddings",
                    0.0,
                )
            )
        factor = inner.get("factor")
        if factor is None and original and longest:
            factor = _number(longest, "max_position_embeddings", 0.0) / original
        optional = {
            key: _number(inner[key], key, 0.0)
            for key in ("attention_factor", "mscale", "mscale_all_dim")
            if inner.get(key) is not None and not (inner[key] == 0 and key != "attention_factor")
        }
        return cls(
            dim,
            theta,
            kind,
            _number(factor, "factor", 0.0),
            original,
            _number(inner.get("beta_fast") or 32, "beta_fast", 0.0),
            _number(inner.get("beta_slow") or 1, "beta_slow", 0.0),
            truncate=inner.get("truncate") is not False,
            **optional,
        )

    def correction_range(self) -> tuple[float, float]:
        """YaRN: the pairs (lo, hi) between which interpolation sets in.

        Below lo a pair turns more than beta_fast times over the original length and is kept,
        above hi less than beta_slow times and is stretched by the factor.
        """
        bounds = []
        for turns in (self.beta_fast, self.beta_slow):
            wavelengths = self.original_max_position / (2 * math.pi * turns)
            bounds.append(self.dim * math.log(wavelengths) / (2 * math.log(self.theta)))
        low, high = bounds
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        return low, high + 0.001 if low == high else high

    def inv_freq(self) -> np.ndarray:
        """Radians per position of every pair: float64 [dim/2].

        YaRN (Peng et al. 2023, arXiv 2309.00071, as Hugging Face computes it) blends each
        frequency with the one divided by `factor`: the blend is of frequencies, not of divisors.
        """
        pairs = np.arange(self.dim // 2, dtype=np.float64)
        base = self.theta ** (-2.0 * pairs / self.dim)
        if self.rope_type == "default":
            return base
        if self.rope_type == "linear":
            return base / self.factor
        low, high = self.correction_range()
        ramp = np.clip((pairs - low) / (high - low), 0.0, 1.0)
        return base * ((1.0 - ramp) + ramp / self.factor)

    def attention_scale(self) -> float:
        """The factor on cos and sin, of queries and of keys: attention logits grow by its square.

        1 but for YaRN.
        """
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


class Rope:
    """What `rotate` turns rows by: holds cos and sin of every position met so far.

    The tables take 4 * dim bytes a position, up to the highest position asked for.
    """

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self._inv_freq = config.inv_freq()
        half = config.dim // 2
        self._cos = np.zeros((0, half), np.float32)
        self._sin = np.zeros((0, half), np.float32)
        self._last: tuple[np.ndarray, mx.array, mx.array] | None = None
        self._steps: dict[int, tuple[mx.array, mx.array]] = {}  # of the table, on the device
        self._asked: np.ndarray | None = None

    def rows(self, positions: np.ndarray, like: Array) -> tuple[Array, Array]:
        """cos and sin of positions int [N], float32 [N, dim/2] each; arrays of the kind of `like`.

        Every layer of a forward asks for the same positions: the last answer is kept.
        """
        if is_numpy(like):
            # Every layer of a pass hands over the same array.
            if self._asked is not positions:
                self._reach(positions)
                self._asked = positions
                self._rows = self._cos[positions], self._sin[positions]
            return self._rows
        if self._last is None or not np.array_equal(self._last[0], positions):
            self._reach(positions)
            self._last = (positions.copy(), *self._on_device(positions))
        return self._last[1], self._last[2]

    def run(self, first: int, count: int) -> tuple[mx.array, mx.array]:
        """cos and sin of up to LONGEST_RUN neighbouring positions, float32 [count, dim/2] each:
        views of a part of the table, which a GPU gets once."""
        assert 0 < count <= LONGEST_RUN
        step, place = divmod(first, _TABLE_STEP)
        if step not in self._steps:
            end = (step + 1) * _TABLE_STEP + LONGEST_RUN
            self._grow(end)
            rows = slice(step * _TABLE_STEP, end)
            tables = (resident(table[rows], mx.float32) for table in (self._cos, self._sin))
            self._steps = {step: (next(tables), next(tables))}
        cos, sin = self._steps[step]
        return cos[place : place + count], sin[place : place + count]

    def _on_device(self, positions: np.ndarray) -> tuple[mx.array, mx.array]:
        if len(positions) == 1:
            return self.run(int(positions[0]), 1)
        return mx.array(self._cos[positions]), mx.array(self._sin[positions])

    def _reach(self, positions: np.ndarray) -> None:
        assert positions.ndim == 1
        assert positions.size == 0 or positions.min() >= 0
        self._grow(int(positions.max(initial=-1)) + 1)

    def _grow(self, length: int) -> None:
        """Extend the tables to `length` positions, in whole steps.

        A step is always computed as one array of one shape, so that a position's cos has the same
        bits however far the table reached when it was asked for.
        """
        cos, sin = [self._cos], [self._sin]
        scale = self.config.attention_scale()
        for start in range(len(self._cos), length, _TABLE_STEP):
            step = np.arange(start, start + _TABLE_STEP, dtype=np.float64)
            angles = step[:, None] * self._inv_freq[None, :]
            cos.append((np.cos(angles) * scale).astype(np.float32))
            sin.append((np.sin(angles) * scale).astype(np.float32))
        if len(cos) > 1:
            self._cos, self._sin = np.concatenate(cos), np.concatenate(sin)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """The first 2 * half dimensions of x [..., N, D] turned by cos, sin [N, half]; same shape and
    dtype. The others pass unchanged. Computed in float32 and cast back."""
    if is_numpy(x):
        return cpu.rotate(x, cos, sin)
    half = cos.shape[1]
    first = x[..., :half].astype(mx.float32)
    second = x[..., half : 2 * half].astype(mx.float32)
    turned = [
        (first * cos - second * sin).astype(x.dtype),
        (second * cos + first * sin).astype(x.dtype),
    ]
    if x.shape[-1] > 2 * half:
        turned.append(x[..., 2 * half :])
    return mx.concatenate(turned, axis=-1)


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The one dictionary that describes the scaling: rope_parameters or rope_scaling."""
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"{key} is {value!r}, expected an object")
        if value and all(isinstance(entry, dict) for entry in value.values()):
            # One set per layer type. They may be spelt out and still agree.
            sets = list(value.values())
            if any(entry != sets[0] for entry in sets):
                raise CheckpointError(
                    f"{key} differs between layer types ({', '.join(value)}), "
                    "expected one set for all layers"
                )
            value = sets[0]
        found[key] = value
    kinds = {
        str(entry.get("rope_type") or entry.get("type") or "default") for entry in found.values()
    }
    if len(kinds - {"mrope"}) > 1:
        raise CheckpointError(
            "rope_scaling and rope_parameters name different types "
            f"({', '.join(sorted(kinds))}), expected one"
        )
    return {**found.get("rope_scaling", {}), **found.get("rope_parameters", {})}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _number(value: Any, key: str, above: float) -> float:
    """A finite number above a bound, or CheckpointError naming the key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{key} is {value!r}, expected a number")
    if value <= above:
        raise CheckpointError(f"{key} is {value}, expected a number above {above:g}")
    return float(value)
