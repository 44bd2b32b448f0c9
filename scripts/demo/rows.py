"""Regenerated rows, what the target makes of them, and the positions at which blocks begin."""

from __future__ import annotations

import bisect
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from delta import CHUNK
from model import Target


class Rows:
    """Regenerated rows of one length and, for one pool of them, what the target makes of them."""

    def __init__(
        self,
        pattern: Path,
        batch: int,
        device: str,
        end: str = "end",
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Share ``part`` (which one, of how many) of the rows in all files that fit ``pattern``."""
        found: list[list[np.ndarray]] = []
        for path in sorted(pattern.parent.glob(pattern.name)):
            stored = np.load(path)
            usable = np.nonzero(stored[end] - stored["size"] >= 4)[0]
            mine = usable[part[0] :: part[1]]
            found.append([stored[name][mine] for name in ("tokens", "size", end)])
        if not found:
            raise FileNotFoundError(pattern)
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.random.default_rng(0).permutation(len(columns[0]))
        self.stored = [torch.from_numpy(x[order].astype(np.int32)).to(device) for x in columns]
        self.batch = batch
        self.total = int(self.stored[2].sum())  # positions to keep, of all pools
        self.divide(1)

    def divide(self, pools: int) -> None:
        self.pools = torch.arange(len(self.stored[1]), device=self.stored[1].device).chunk(pools)
        self.taps = self.hidden = torch.empty(0)

    @torch.no_grad()
    def fill(self, pool: int, target: Target, layers: tuple[int, ...]) -> None:
        """Run the target over a pool; only positions before a row's end are kept."""
        rows = self.pools[pool % len(self.pools)]
        self.tokens, self.size, self.end = (x[rows].long() for x in self.stored)
        self.start = self.end.cumsum(0) - self.end
        if not len(self.taps):  # one allocation, for the largest pool
            most = max(int(self.stored[2][part].sum()) for part in self.pools)
            width, like = target.cfg.hidden, {"dtype": target.dtype, "device": rows.device}
            self.taps = torch.empty(most, len(layers) * width, **like)
            self.hidden = torch.empty(most, width, **like)
        order = self.end.argsort()
        ends, first = self.end[order].tolist(), 0
        full = self.tokens.shape[1]
        while first < len(order):  # short rows together, in two lengths
            length = half_length(full) if ends[first] <= half_length(full) else full
            count = self.batch * full // length
            pick = torch.arange(first, first + count, device=rows.device)
            first = min(first + count, bisect.bisect_right(ends, length))
            pick = order[pick.clamp_max(first - 1)]  # a full batch: one shape to compile
            hidden, seen, _, _ = target(self.tokens[pick, :length], layers)
            steps = torch.arange(length, device=rows.device)
            inside = steps < self.end[pick].unsqueeze(1)
            where = (self.start[pick].unsqueeze(1) + steps)[inside]
            self.taps[where] = torch.cat([x.to(target.dtype) for x in seen], -1)[inside]
            self.hidden[where] = hidden.to(target.dtype)[inside]

    def next(self) -> tuple[Tensor, ...]:
        """A batch of rows, each drawn as often as it has tokens to learn from."""
        pick = torch.multinomial((self.end - self.size).float(), self.batch, replacement=True)
        return self.take(pick)

    def take(self, pick: Tensor) -> tuple[Tensor, ...]:
        """tokens [B, T], size [B], end [B], taps [B, T, n * H], hidden [B, T, H]; after a row's
        end the last two belong to other rows."""
        tokens = self.tokens[pick]
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        where = (self.start[pick].unsqueeze(1) + steps).clamp_max(len(self.taps) - 1)
        return tokens, self.size[pick], self.end[pick], self.taps[where], self.hidden[where]


def half_length(length: int) -> int:
    """About half of a row's length, in whole chunks of the delta rule."""
    return -(-length // (2 * CHUNK)) * CHUNK


def pick_anchors(size: Tensor, end: Tensor, count: int) -> Tensor:
    """[B, A] positions a with size <= a and a + 1 < end."""
    room = (end - 1 - size).clamp_min(1).unsqueeze(1)
    offset = (torch.rand(len(size), count, device=size.device) * room).long()
    return size.unsqueeze(1) + torch.minimum(offset, room - 1)
