"""Choose the parameters to train, the optimiser, and the learning rate and budget of each step."""

import math
from typing import Any

import torch
from torch import nn

from rayclip.methods import Method, Recipe
from rayclip.models import Clip


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: warm-up, then the schedule (`Recipe`)."""
    written = recipe.warmup_steps + recipe.warmup_epochs * total_steps // recipe.epochs
    warmup = written if recipe.warmup_whole else min(written, total_steps // 10)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup if recipe.warmup_lr is None else recipe.warmup_lr
    done = (step - warmup) / max(1, total_steps - warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return recipe.lr * left[recipe.schedule]


def eps_share(warmup_steps: float, step: int) -> float:
    """Return the fraction of its budget that the training attack uses at a step, counted from 0."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def make_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # Fused: one pass over the memory, which on a CPU takes a tenth of the time of one pass per term
    shared: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=recipe.momentum, **shared)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(parameters, betas=recipe.betas, eps=recipe.adam_eps, **shared)


def choose_trainable(clip: Clip, method: Method) -> list[nn.Parameter]:
    """Enable gradients of the parameters that the method trains; return these parameters."""
    clip.requires_grad_(False)
    chosen = [] if method.lora is not None else method.parameters(clip)
    for p in chosen:
        p.requires_grad_(True)
    return chosen
