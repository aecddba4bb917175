"""Muon, the optimizer that makes the demo's first minutes short: the tiny ViT learns to read in half of AdamW's steps.

Each matrix moves along its momentum with all singular values brought to about one (Jordan et al. 2024), so rare
directions, such as those of a digit, are not drowned by common ones. Only for the tiny parents; the stages use
whatever the recipe says.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial whose iteration drives singular values to about 1


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(rows, columns) with the same singular vectors and singular values near one (between 0.7 and 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions; embeddings, biases and norms belong to AdamW."""

    def __init__(self, weights, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalised(weight.grad.lerp(velocity, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
