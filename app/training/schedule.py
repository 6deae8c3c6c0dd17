"""The learning rate, by step."""

import math

from app.config import Training


def peak(training: Training, num_workers: int) -> float:
    """The highest learning rate with so many workers.

    A batch that grows with the workers needs fewer steps of greater length: in proportion for plain
    gradient descent (Goyal et al., 2017), with the square root for Adam (Malladi et al., 2022).
    """
    factor = {"none": 1.0, "sqrt": math.sqrt(num_workers), "linear": float(num_workers)}
    return training.learning_rate * factor[training.scale_learning_rate]


def rate(training: Training, num_workers: int, progress: float) -> float:
    """The learning rate after `progress` epochs (a fraction counts): warm-up, then the schedule."""
    top = peak(training, num_workers)
    warmup = training.warmup_epochs
    if progress < warmup:
        return top * progress / warmup
    done = (progress - warmup) / max(training.epochs - warmup, 1e-9)
    match training.schedule:
        case "cosine":  # Loshchilov and Hutter, 2017
            return top * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return top * (1 - done)
        case _:
            return top
