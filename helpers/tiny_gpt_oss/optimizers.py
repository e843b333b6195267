"""What changes the weights: Muon for the matrices of the layers, AdamW for all else.

Muon (Jordan and others, 2024, kellerjordan.github.io/posts/muon) makes every direction of a matrix's step equally
long; in the form of Liu and others (2025, arXiv 2502.16982) it takes the learning rates of AdamW. With it a model
learns to read from far fewer answers: the card has the numbers.
"""

from collections.abc import Iterator

import torch
from transformers import GptOssForCausalLM

WEIGHT_DECAY = 0.05


def make(model: GptOssForCausalLM, rate: float) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers of a model by name; each weight belongs to one. Gradients have to be there already."""
    # Of attention and experts, without biases and routers.
    layers = {name: weight for name, weight in model.named_parameters() if name.endswith(("proj.weight", "_proj"))}
    others = [weight for name, weight in model.named_parameters() if name not in layers]
    matrices = [matrix for weight in layers.values() for matrix in _matrices(weight)]
    groups = [
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in others if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return {
        "muon": torch.optim.Muon(matrices, rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), fused=True),
    }


def _matrices(weight: torch.nn.Parameter) -> Iterator[torch.nn.Parameter]:
    """Yield a weight, or of one with a matrix an expert each matrix: on the same memory, gradients too."""
    if weight.ndim == 2:
        yield weight
        return
    for number in range(len(weight)):
        matrix = torch.nn.Parameter(weight.detach()[number])
        matrix.grad = weight.grad[number]
        yield matrix
