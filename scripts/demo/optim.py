"""Muon for the matrices and AdamW for everything else, with one common schedule.

Muon replaces the momentum of a matrix by its nearest orthogonal matrix (five Newton-Schulz steps in
bfloat16). Matrices of one shape are stacked, so that a step is a handful of batched products.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(m: Tensor) -> Tensor:
    """Newton-Schulz iteration on a batch [N, rows, columns] with rows <= columns."""
    x = m.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(-4.7750 * gram, gram, gram, alpha=2.0315) @ x
    return x


class Muon(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                memory = self.state[p].setdefault("momentum", torch.zeros_like(p))
                memory.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(memory, group["momentum"])  # Nesterov
                rows, columns = p.shape[-2:]
                flat = update.reshape(-1, rows, columns)
                flat = flat.mT if rows > columns else flat
                stacks[flat.shape[-2], flat.shape[-1]].append((p, flat))
            for items in stacks.values():
                done = orthogonalise(torch.cat([flat for _, flat in items]))
                for (p, _), new in zip(items, done.split([len(f) for _, f in items]), strict=True):
                    rows, columns = p.shape[-2:]
                    new = (new.mT if rows > columns else new).reshape(p.shape)
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(new, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


class Optimiser:
    """Both optimisers behind one ``step``; ``scale`` multiplies every learning rate.

    Gradients are left as they are: the caller zeroes them.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, decay: float) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            inner = p.ndim >= 2 and min(p.shape[-2:]) > 8
            edge = any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate."))
            (matrices if inner and not edge else rest).append(p)
        fused = next(model.parameters()).is_cuda
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, muon_lr, decay),
            torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
        ]
        self.base = [muon_lr, adam_lr]

    def step(self, scale: float) -> None:
        for part, lr in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = lr * scale
            part.step()

    def state_dict(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def trapezoid(progress: float, warm: float = 0.02, cool: float = 0.35, floor: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, plateau, linear cool-down."""
    if progress < warm:
        return progress / warm
    return 1.0 if progress < 1 - cool else max(floor, (1 - progress) / cool)
