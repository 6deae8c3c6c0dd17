"""The task of networks that predict a binary label from numbers and categories."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy as log_loss

from app.config import Project
from app.data.prepare import LABEL, Prepared
from app.evaluation import metrics
from app.tasks import Arrays
from app.tasks.tabular.network import NETWORKS

VALIDATION_BATCH_ROWS = 8192
"""Number of rows in a forward pass of the validation."""


class Task:
    """See `app.tasks.task.Task`."""

    def __init__(self, project: Project, prepared: Prepared):
        self.project = project
        self.score = project.model.score
        self.prepared = prepared
        self.preprocessor = prepared.preprocessor

    def arrays(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """`x`, float32 (rows, layout.width); `y` and `weight`, float32 (rows,)."""
        y = np.array(frame[LABEL], dtype=np.float32)
        return {"x": self.preprocessor.transform(frame), "y": y, "weight": self._weights(y)}

    def _weights(self, y: np.ndarray) -> np.ndarray:
        if self.project.training.class_weights == "none":
            return np.ones_like(y)
        return self.prepared.balanced_weights()[y.astype(np.int64)]

    def network(self) -> nn.Module:
        model = self.project.model
        return NETWORKS[model.kind](model, self.preprocessor.layout)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        return network.parameter_groups()

    def arrange(self, arrays: Arrays, order: Tensor, batch_size: int) -> Tensor:
        return order

    def batch(self, arrays: Arrays, rows: Tensor) -> tuple[Tensor, ...]:
        """`x`, `y` and `weight` of these rows."""
        return arrays["x"][rows], arrays["y"][rows], arrays["weight"][rows]

    def outputs(self, network: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
        """Probabilities (rows,) and labels (rows,)."""
        probabilities = [network(x).float() for x in arrays["x"].split(VALIDATION_BATCH_ROWS)]
        return torch.cat(probabilities), arrays["y"]

    def metrics(self, *outputs: Tensor) -> dict[str, float]:
        """Log loss and AUC."""
        probabilities, labels = outputs
        if not probabilities.isfinite().all():  # PyTorch's log loss would raise an error
            return {"loss": math.nan, "auc": math.nan}
        loss = log_loss(probabilities.double(), labels.double()).item()
        return {"loss": loss, "auc": metrics.auc(labels.numpy(), probabilities.numpy())}
