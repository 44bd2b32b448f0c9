"""Token files on the device: shuffled training rows, held-out rows and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenise import EOS_ID


def read(path: Path, device: str) -> Tensor:
    """A uint16 token file as int32 on the device."""
    return torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int32)).to(device)


def rows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """[N, length] int64 windows that begin at ``starts``."""
    steps = torch.arange(length, device=tokens.device)
    return tokens[starts.unsqueeze(1) + steps].long()


def epochs(tokens: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled [batch, length + 1] rows; every epoch cuts the stream at a new offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(tokens) - offset - 1) // length
        order = torch.randperm(count, generator=generator).to(tokens.device)
        for i in range(0, count - batch + 1, batch):
            yield rows(tokens, order[i : i + batch] * length + offset, length + 1)


def in_order(tokens: Tensor, batch: int, length: int) -> Iterator[Tensor]:
    """[batch, length + 1] rows of a held-out file, front to back; the remainder is dropped."""
    count = (len(tokens) - 1) // length
    starts = torch.arange(count, device=tokens.device) * length
    for i in range(0, count - batch + 1, batch):
        yield rows(tokens, starts[i : i + batch], length + 1)


def prompts(
    tokens: Tensor, newline: Tensor, count: int, low: int, high: int, length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Random prompts: half are document beginnings, half begin after a line break.

    newline: [V] bool, tokens that end a line. Returns rows [count, length], of which only the
    first ``size`` tokens are the prompt, and ``size`` [count], low <= size < high.
    """
    generator = torch.Generator().manual_seed(seed)
    room = len(tokens) - length - 1
    heads = (tokens[:room] == EOS_ID).nonzero().squeeze(1).cpu() + 1
    lines = newline[tokens[:room].long()].nonzero().squeeze(1).cpu() + 1
    half = count // 2
    pick_heads = heads[torch.randint(len(heads), (half,), generator=generator)]
    pick_lines = lines[torch.randint(len(lines), (count - half,), generator=generator)]
    size = torch.randint(low, high, (count,), generator=generator)
    starts = torch.cat([pick_heads, pick_lines]).to(tokens.device)
    return rows(tokens, starts, length), size.to(tokens.device)
