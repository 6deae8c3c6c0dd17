"""The learning rate of each step."""

import math

from app.config import Training


def peak(training: Training, num_workers: int) -> float:
    """The highest learning rate, with `num_workers` workers.

    The batch of a step grows with the workers, so an epoch has fewer steps, and these must be longer: in
    proportion to the number of workers for plain gradient descent (Goyal et al., 2017), to its square root
    for Adam (Malladi et al., 2022).
    """
    factor = {"none": 1.0, "sqrt": math.sqrt(num_workers), "linear": float(num_workers)}
    return training.learning_rate * factor[training.scale_learning_rate]


def rate(training: Training, num_workers: int, progress: float) -> float:
    """The learning rate after `progress` epochs, which may be a fraction: the warm-up, then the schedule."""
    highest = peak(training, num_workers)
    warmup = training.warmup_epochs
    if progress < warmup:
        return highest * progress / warmup
    share = (progress - warmup) / max(training.epochs - warmup, 1e-9)
    match training.schedule:
        case "cosine":  # Loshchilov and Hutter, 2017
            return highest * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return highest * (1 - share)
        case _:
            return highest
