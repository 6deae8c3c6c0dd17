"""The packager of networks that predict a binary label from numbers and categories."""

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
    """See `app.tasks.task.Packager`."""

    def __init__(self, task: Task):
        self.task = task

    def export(self, network: nn.Module, folder: Path) -> float:
        preprocessor, model = self.task.preprocessor, folder / "model.onnx"
        graph.export(network, preprocessor, model)
        (folder / "preprocessor.json").write_text(preprocessor.model_dump_json(indent=1))
        return graph.difference(network, preprocessor, model, self.task.prepared.frame("test"))

    def schema(self) -> Schema:
        return label_schema(self.task.project, self.task.preprocessor, self.task.prepared.summary["labels"])

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        test = self.task.prepared.frame("test", rows)
        return predictions.evaluate(self.task.project, test, bundle.predict(test))
