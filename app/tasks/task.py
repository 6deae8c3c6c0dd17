"""The protocols that every family of models implements: a task to train, a packager to make a bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
from torch import Tensor, nn

from app.config import Project
from app.data.prepare import Prepared

if TYPE_CHECKING:
    from app.bundle.bundle import Bundle
    from app.bundle.schema import Schema

Arrays = Mapping[str, Tensor]
"""Rows of a part in training: tensors by name, whose first axis is the rows."""


class Task(Protocol):
    """Everything that training needs from a family of models, for a project and its prepared data."""

    score: str
    """Validation metric that decides which epoch is best; higher is better."""
    project: Project
    prepared: Prepared

    def __init__(self, project: Project, prepared: Prepared): ...

    def arrays(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Convert rows of a part to writable arrays by name, whose first axis is the rows.

        Each rank calls this once for each part, with its own rows.
        """

    def network(self) -> nn.Module:
        """Make a network, with random parameters from torch's global generator.

        Its `forward` computes what the exported graph computes; its `loss(*batch)` is the mean loss of a
        batch, float32 ().
        """

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, with each trainable parameter in one of them. A group's
        `lr_scale` multiplies the learning rate."""

    def arrange(self, arrays: Arrays, order: Tensor, batch_size: int) -> Tensor:
        """The order of the row numbers in an epoch, int64 (length,), from the random `order`.

        For a family whose batches should have similar rows; others return `order`.
        """

    def batch(self, arrays: Arrays, rows: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `network.loss` for the row numbers `rows`, int64 (batch,). Random draws are from
        torch's global generator."""

    def outputs(self, network: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
        """The arguments of `metrics` for a rank's validation rows, (rows, ...) each. Training concatenates
        those of all ranks."""

    def metrics(self, *outputs: Tensor) -> dict[str, float]:
        """Metrics of the validation part by name: `loss`, the score and others. NaN if the outputs are not
        finite."""


class Packager(Protocol):
    """Makes a bundle from a task's trained network, and evaluates bundles.

    Training does not import packagers, so a change of one leaves trained networks valid.
    """

    task: Task

    def __init__(self, task: Task): ...

    def export(self, network: nn.Module, folder: Path) -> float:
        """Write `model.onnx` and the family's other files of a bundle.

        Returns the largest difference between the graph's and PyTorch's outputs on the test part. Raises
        RuntimeError if it exceeds `onnx.MAX_DIFFERENCE`.
        """

    def schema(self) -> "Schema":
        """Inputs and outputs of the bundle."""

    def evaluate(self, bundle: "Bundle", rows: np.ndarray | None = None) -> dict[str, Any]:
        """Evaluate a bundle on the test part, or on its rows where the mask `rows` is true.

        Returns the metrics by name under `model`; other keys are for the card.
        """
