"""The state of a training: all that changes from one step to the next, saved in checkpoints and restored."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from app.training import checkpoint
from app.training.checkpoint import Checkpoints
from app.training.collective import Collective
from app.training.device import random_state


@dataclass
class State:
    """The state of one rank's training loop. A checkpoint stores all of it, and nothing else.

    What is computed from the project and the position is not state: the order of the rows, the learning rate,
    the seed of an epoch.
    """

    network: nn.Module
    """The same on all ranks."""
    optimizer: torch.optim.Optimizer
    """The same on all ranks."""
    scaler: torch.amp.GradScaler
    """The loss scale of fp16, the same on all ranks; disabled in other precisions."""
    loss: Tensor
    """Sum of this rank's losses in the current epoch, float32 ()."""
    steps_per_epoch: int
    """Number of steps in an epoch with the current number of ranks."""
    epoch: int = 0
    """Index of the current epoch."""
    step: int = 0
    """Number of steps made in the current epoch."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each completed epoch."""
    random: Tensor | None = None
    """Random state of this rank, uint8 (bytes,), as read from a checkpoint within an epoch. None at the start
    of an epoch, which is seeded, and on a rank that did not exist when the checkpoint was written."""

    @property
    def last_step(self) -> tuple[int, int]:
        """Epoch and number of the last step that was made."""
        if self.step == 0 and self.epoch > 0:
            return self.epoch - 1, self.steps_per_epoch
        return self.epoch, self.step

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the current epoch, and make the next one current."""
        self.history.append(metrics)
        self.epoch += 1
        self.step = 0
        self.loss.zero_()

    def save(self, checkpoints: Checkpoints, ranks: Collective, score: str) -> None:
        """Write a checkpoint in the background on rank 0, which gathers the other ranks' part of the state.

        `score` is the validation metric that decides which completed epoch is best. Raises the exception of
        the previous write if it failed.
        """
        random = ranks.gather(random_state(self.loss.device)[None])
        losses = ranks.gather(self.loss[None].cpu())
        if ranks.rank != 0:
            return
        tensors = {
            "model": self.network.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
            "ranks": {"random": random, "loss": losses},
        }
        values: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "history": list(self.history),  # a copy: a thread writes it while the loop adds the next epoch
            "scaler": self.scaler.state_dict(),
            "score": self.history[-1][f"validation_{score}"] if self.step == 0 else None,
        }
        checkpoints.save(tensors, values)

    def resume(self, checkpoints: Checkpoints, ranks: Collective, on_note: Callable[[str], None]) -> None:
        """Restore the last undamaged checkpoint, the same on all ranks; without one, change nothing.

        If the number of ranks has changed, so has the number of steps in an epoch. The training then resumes
        after the same share of the epoch, with the same mean loss. `on_note` receives lines for the user.
        """
        latest = checkpoints.latest(on_note) if ranks.rank == 0 else None
        position = torch.tensor([int(part) for part in latest.name.split("-")] if latest else [-1, -1])
        ranks.broadcast([position])
        if position[0] < 0:
            return
        tensors, values = checkpoint.read(checkpoints.folder_of(*position.tolist()))
        self.network.load_state_dict(tensors["model"])
        checkpoint.restore_optimizer(self.optimizer, tensors["optimizer"])
        self.scaler.load_state_dict(values["scaler"])
        self.epoch, self.history = values["epoch"], values["history"]
        self.step = values["step"] * self.steps_per_epoch // values["steps_per_epoch"]
        losses = tensors["ranks"]["loss"]
        if ranks.rank < len(losses):
            self.loss.fill_(losses[ranks.rank])
            if self.step:
                self.random = tensors["ranks"]["random"][ranks.rank]
        if self.step != values["step"]:
            self.loss.fill_(losses.mean().item() * self.step / values["step"])
        step = f", step {self.step} of {self.steps_per_epoch}" if self.step else ""
        on_note(f"resuming from epoch {self.epoch + 1}{step}, {ranks.size} workers")
