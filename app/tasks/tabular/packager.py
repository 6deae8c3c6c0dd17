"""Making a bundle of a trained network on a table, and measuring it."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from app.bundle.bundle import Bundle
from app.bundle.schema import Schema, schema_of
from app.data.prepare import LABEL
from app.evaluation import metrics, slices
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
        return schema_of(self.task.project, self.task.preprocessor, labels)

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        test = self.task.prepared.frame("test")
        if rows is not None:
            test = test[rows].reset_index(drop=True)
        labels = test[LABEL].to_numpy()
        probabilities = bundle.predict({i.name: test[i.name].to_numpy() for i in bundle.schema.inputs})
        return {
            "model": metrics.evaluate(labels, probabilities),
            "reliability": metrics.reliability(labels, probabilities),
            "slices": slices.slices(
                test,
                self.task.project.evaluation.slices,
                lambda rows: slices.of_binary(labels[rows], probabilities[rows]),
            ),
        }
