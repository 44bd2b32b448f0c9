"""The GPUs that train one draft together: one process each, started by ``torchrun``."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


class Team:
    """This process among the others, or alone where nothing started several."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.first = self.rank == 0
        self.device = "cpu"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            self.device = f"cuda:{torch.cuda.current_device()}"
        if self.size > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def average(self, model: nn.Module) -> None:
        """Every gradient becomes its mean over the team."""
        if self.size == 1:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        parts = flat.div_(self.size).split([g.numel() for g in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))

    def agree(self, value: float) -> float:
        """The first process's value: learning rates and the end must be the same for all."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
