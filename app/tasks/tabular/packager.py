"""Making a bundle of a trained network on a table, and measuring it."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from app.bundle.bundle import Bundle
from app.bundle.schema import Schema, label_schema
from app.evaluation import predictions
from app.tasks.tabular import graph
from app.tasks.tabular.task import Task


class Packager:
    """See `app.tasks.Packager`."""

    def __init__(self, task: Task):
        self.task = task

    def export(self, network: nn.Module, folder: Path) -> float:
        graph.export(network, self.task.preprocessor, folder / "model.onnx")
        (folder / "preprocessor.json").write_text(self.task.preprocessor.model_dump_json(indent=1))
        return graph.difference(
            network, self.task.preprocessor, folder / "model.onnx", self.task.prepared.frame("test")
        )

    def schema(self) -> Schema:
        labels = self.task.prepared.summary["labels"]
        return label_schema(self.task.project, self.task.preprocessor, labels)

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        test = self.task.prepared.frame("test", rows)
        return predictions.evaluate(self.task.project, test, bundle.predict(test))
