"""What every family of models implements, from prepared rows to a bundle."""

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
"""Rows of a part as training keeps them: tensors whose first axis is the rows."""


class Task(Protocol):
    """A project and its prepared data, as one family of models sees them: what training needs."""

    score: str
    """Validation metric that decides which epoch is best; higher is better."""
    project: Project
    prepared: Prepared

    def __init__(self, project: Project, prepared: Prepared): ...

    def arrays(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Convert rows of a part to writable arrays with as many rows, once on each rank for its own rows."""

    def network(self) -> nn.Module:
        """Make a network with random parameters from torch's global seed.

        Its `forward` is what the graph computes; its `loss(*batch)` is the mean loss of a batch.
        """

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Groups for the optimizer, with every trainable parameter in one of them. A group's `lr_scale`
        multiplies the learning rate."""

    def arrange(self, arrays: Arrays, order: Tensor, batch_size: int) -> Tensor:
        """Rearrange an epoch's random order of row numbers, for a family whose batches should hold similar
        rows."""

    def batch(self, arrays: Arrays, rows: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `network.loss` for these row numbers. Draws from torch's global generator."""

    def outputs(self, network: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
        """What `metrics` needs of a rank's validation rows, (rows, ...) each. The ranks' outputs are
        concatenated."""

    def metrics(self, *outputs: Tensor) -> dict[str, float]:
        """Metrics of the validation part: `loss`, the score and others worth a curve. NaN if the outputs
        are not finite."""


class Packager(Protocol):
    """Makes a bundle of a task's trained network and evaluates it.

    Training does not import this, so a change of a packager leaves trained networks valid.
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

        `model` holds the metrics by name; other keys are for the card.
        """
