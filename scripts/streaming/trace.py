"""Which experts the rows of a text choose: a routing trace with locality, and a random one.

With locality (`local_trace`): every layer keeps its experts in a stack by recency, and a token
picks its experts by depth in the stack: so many of its picks from the first top-k places (what the
token before used), so many from there to 1/8 of the experts, to 1/4, to 1/2, and to the end. This
is the LRU stack model (Spirn and Denning, 1972): the share of picks above a depth is the hit rate
of an LRU cache of that many experts a layer. Shares are such that the hit rates at 1/2, 1/4 and 1/8
of the experts are those asked for, and the first one such that 8 consecutive tokens use as many
distinct experts as asked for. What is picked by the token's identity (`affinity`: from experts that
belong to the token) is taken into account by fitting the shares to what a generated trace has.

A row that a draft alone led to (a sibling of the text's token, or anything below one) keeps each of
the experts of the text's token in its place with the probability `kinship`, and picks the others as
a token there would.

Random (`random_trace`): every row picks at random, the worst case for a cache.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

TARGETS = (0.89, 0.67, 0.45)  # LRU hit rates at 1/2, 1/4, 1/8 of the experts (omlx#2595)
UNION = 39.4 / 64  # distinct experts of 8 rows, by their picks: 39.4 of 8 x 8 (lucebox-hub#501)
AFFINITY = 0.15
KINSHIP = 0.5
WORDS = 4096  # tokens that occur, by Zipf's law


@dataclass(frozen=True)
class Shape:
    """What a trace is about."""

    layers: int
    experts: int
    top_k: int
    vocabulary: int

    @property
    def edges(self) -> tuple[int, ...]:
        """Depths at which the bands of the stack end: top-k, 1/8, 1/4, 1/2, all."""
        return self.top_k, *(self.experts // part for part in (8, 4, 2, 1))


@dataclass(frozen=True, eq=False)
class Trace:
    """A text's tokens and their routing.

    tokens: int32 [length]. experts: int32 [length, layers, top_k], distinct in a row.
    stacks: int32 [length, layers, experts], experts by recency before each token; None where
        routing is random. shares: of the stack's bands. kinship: see the module.
    """

    shape: Shape
    tokens: np.ndarray
    experts: np.ndarray
    stacks: np.ndarray | None = None
    shares: tuple[float, ...] = ()
    kinship: float = KINSHIP

    def __len__(self) -> int:
        return len(self.tokens)

    def save(self, path: Path) -> Path:
        """Tokens and routing of the text, for `load`; not what rows beside it would choose."""
        shape = np.array([*astuple(self.shape)])
        np.savez(path, shape=shape, tokens=self.tokens, experts=self.experts)
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path) as held:
            shape = Shape(*held["shape"].tolist())
            return cls(shape, held["tokens"], held["experts"])

    def row(self, position: int, token: int, of_the_text: bool) -> np.ndarray:
        """int32 [layers, top_k] of a row: of the text, or of a draft alone. A function of its
        arguments: all budgets meet the same rows."""
        if of_the_text:
            return self.experts[position]
        shape, rng = self.shape, np.random.default_rng((position, token))
        if self.stacks is None:
            return _random_rows(rng, shape)
        kept = rng.random((shape.layers, shape.top_k)) < self.kinship
        same = [row[keep].tolist() for row, keep in zip(self.experts[position], kept, strict=True)]
        return np.stack([self.like(rng, at, position, same[at]) for at in self._layers])

    def like(
        self, rng: np.random.Generator, layer: int, position: int, given: list[int]
    ) -> np.ndarray:
        """int32 [top_k]: the given experts, and others picked as a token at the position would."""
        if self.stacks is None:
            return _random_rows(rng, self.shape)[layer]
        return _pick(rng, self.stacks[position, layer], self.shape, self.shares, given)

    def recent(self, layer: int, until: int, count: int) -> np.ndarray:
        """The last `count` experts of a layer that tokens before `until` used, the last first."""
        flat = self.experts[:until, layer][::-1].reshape(-1)
        _, first = np.unique(flat, return_index=True)
        return flat[np.sort(first)][:count]

    def hit_rate(self, slots: int, first: int = 0) -> float:
        """Of an LRU cache of so many experts a layer, cold, over tokens from `first` on."""
        hits = asked = 0
        for layer in range(self.shape.layers):
            held: list[int] = []
            for at, row in enumerate(self.experts[:, layer].tolist()):
                if at >= first:
                    hits += len(set(held).intersection(row))
                    asked += len(row)
                held = (row + [one for one in held if one not in row])[:slots]
        return hits / asked

    def distinct(self, rows: int) -> float:
        """Mean number of distinct experts that so many consecutive tokens use of a layer."""
        starts = range(0, len(self) - rows + 1, rows)
        parts = [self.experts[at : at + rows, layer] for at in starts for layer in self._layers]
        return float(np.mean([len(np.unique(part)) for part in parts]))

    def repeated(self) -> float:
        """Share of a token's experts that the token before it used."""
        pairs = zip(self.experts[1:], self.experts[:-1], strict=True)
        return float(
            np.mean([np.isin(now[i], before[i]) for now, before in pairs for i in self._layers])
        )

    @property
    def _layers(self) -> range:
        return range(self.shape.layers)


def random_trace(shape: Shape, length: int, seed: int = 1) -> Trace:
    """Every row picks its experts at random."""
    rng = np.random.default_rng(seed)
    experts = np.stack([_random_rows(rng, shape) for _ in range(length)])
    return Trace(shape, _tokens(rng, shape, length), experts)


def local_trace(
    shape: Shape,
    length: int,
    targets: Sequence[float] = TARGETS,
    union: float = UNION,
    affinity: float = AFFINITY,
    kinship: float = KINSHIP,
    seed: int = 1,
) -> Trace:
    """A trace with the hit rates and the union asked for, fitted on a text of its own."""
    half, quarter, eighth = targets
    assert 0 < eighth < quarter < half < 1
    fitted = replace(shape, layers=min(shape.layers, 4))
    wanted = np.array([eighth, quarter, half])
    hits, recent = wanted.copy(), eighth / 2
    low, high = 0.0, eighth
    for _ in range(12):
        trial = _generate(fitted, 400, _shares(recent, hits), affinity, kinship, seed)
        rates = [trial.hit_rate(depth, 100) for depth in shape.edges[1:4]]
        hits = np.clip(hits + wanted - rates, 0.01, 0.99)
        hits = np.maximum.accumulate(hits)
        # more of what was just used: fewer distinct experts
        if trial.distinct(8) > union * 8 * shape.top_k:
            low = recent
        else:
            high = recent
        recent = min((low + high) / 2, hits[0])
    return _generate(shape, length, _shares(recent, hits), affinity, kinship, seed + 1)


def _shares(recent: float, hits: np.ndarray) -> tuple[float, ...]:
    """Of the bands: hits are their sums from the second band on."""
    sums = np.concatenate([[0.0, min(recent, hits[0])], hits, [1.0]])
    return tuple(np.diff(sums).tolist())


def _generate(
    shape: Shape,
    length: int,
    shares: tuple[float, ...],
    affinity: float,
    kinship: float,
    seed: int,
) -> Trace:
    rng = np.random.default_rng(seed)
    tokens = _tokens(rng, shape, length)
    stacks = np.empty((length, shape.layers, shape.experts), np.int32)
    experts = np.empty((length, shape.layers, shape.top_k), np.int32)
    stack = np.stack([rng.permutation(shape.experts) for _ in range(shape.layers)])
    for at, token in enumerate(tokens.tolist()):
        stacks[at] = stack
        own = _random_rows(np.random.default_rng((seed, token)), shape)
        for layer in range(shape.layers):
            same = own[layer][rng.random(shape.top_k) < affinity].tolist()
            picked = experts[at, layer] = _pick(rng, stack[layer], shape, shares, same)
            rest = stack[layer][~np.isin(stack[layer], picked)]
            stack[layer] = np.concatenate([picked, rest])
    return Trace(shape, tokens, experts, stacks, shares, kinship)


def _pick(
    rng: np.random.Generator,
    stack: np.ndarray,
    shape: Shape,
    shares: tuple[float, ...],
    given: list[int],
) -> np.ndarray:
    """int32 [top_k]: the given experts, and others by their depth in the stack."""
    picked, edges = list(given), (0, *shape.edges)
    taken = set(picked)
    for band in rng.choice(len(shares), shape.top_k - len(picked), p=shares).tolist():
        # a band that is used up gives way to the next one, and the last to the first
        for step in range(len(shares)):
            at = (band + step) % len(shares)
            free = [e for e in stack[edges[at] : edges[at + 1]].tolist() if e not in taken]
            if free:
                break
        picked.append(free[int(rng.integers(len(free)))])
        taken.add(picked[-1])
    return np.array(picked, np.int32)


def _random_rows(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """int32 [layers, top_k]."""
    order = rng.random((shape.layers, shape.experts)).argsort(axis=1)
    return order[:, : shape.top_k].astype(np.int32)


def _tokens(rng: np.random.Generator, shape: Shape, length: int) -> np.ndarray:
    """int32 [length], by Zipf's law; ids spread over the vocabulary, its last one left out."""
    words = min(WORDS, shape.vocabulary - 1)
    shares = 1 / np.arange(1, words + 1)
    ids = rng.permutation(shape.vocabulary - 1)[:words]
    return ids[rng.choice(words, length, p=shares / shares.sum())].astype(np.int32)
