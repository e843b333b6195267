"""What changes the weights: Muon for the matrices of the layers, AdamW for all else.

With Muon a model learns to read from far fewer answers: the card has the numbers.
"""

import torch
from transformers import GptOssForCausalLM

from helpers import settings

WEIGHT_DECAY = 0.05
MOMENTUM = 0.95


def make(model: GptOssForCausalLM, rate: float) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers of a model by name; each weight belongs to one."""
    # Of attention and experts, without biases and routers.
    layers = {name: weight for name, weight in model.named_parameters() if name.endswith(("proj.weight", "_proj"))}
    others = [weight for name, weight in model.named_parameters() if name not in layers]
    groups = [
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in others if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return {
        "muon": Muon(layers.values(), rate, WEIGHT_DECAY),
        "adamw": torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), fused=True),
    }


class Muon(torch.optim.Optimizer):
    """Make every direction of a matrix's step equally long.

    After Jordan and others (2024, kellerjordan.github.io/posts/muon). The steps are as long as those of AdamW mostly
    are, and take its learning rates (Liu and others, 2025, arXiv 2502.16982). Weights are matrices, or stacks of them:
    of experts each has steps of its own. It does what `torch.optim.Muon` does, but with all matrices of one shape at
    once and in a precision that the hardware multiplies. That one takes them one by one, in bfloat16.
    """

    def __init__(self, weights, rate: float, weight_decay: float):
        super().__init__(weights, {"lr": rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights by their gradients."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.Tensor]] = {}
            for weight in group["params"]:
                alike.setdefault(weight.shape[-2:], []).append(weight)
            for shape, weights in alike.items():
                ahead = [self._look_ahead(weight).reshape(-1, *shape) for weight in weights]
                steps = orthogonalize(torch.cat(ahead)).split([len(part) for part in ahead])
                length = 0.2 * max(shape) ** 0.5  # a step's root mean square is then 0.2, as AdamW's mostly is
                for weight, change in zip(weights, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(change.view_as(weight), alpha=group["lr"] * length)

    def _look_ahead(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """Take the gradient into the momentum, and return it with the momentum that comes next (Nesterov's form)."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(momentum, MOMENTUM)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices (count, rows, columns) with the same directions, and singular values between 0.68 and 1.21.

    The iteration of Newton and Schulz with Jordan's coefficients: five rounds that push singular values towards 1. The
    few that are far smaller than a matrix's largest stay behind.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    half = settings.encoder_dtype(matrices.device.type) == "bfloat16"
    x = matrices.mT if tall else matrices  # the smaller side first: its products are the small ones
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if half else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
