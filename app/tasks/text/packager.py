"""The packager of text classifiers."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from app.bundle.bundle import Bundle
from app.bundle.schema import Schema, label_schema
from app.data import tokens
from app.evaluation import predictions
from app.tasks.text import graph
from app.tasks.text import network as networks
from app.tasks.text.task import Task

NUM_CHECKED_TEXTS = 512
"""Maximum number of texts of the test part on which the exported graph is compared with PyTorch."""


class Packager:
    """See `app.tasks.task.Packager`."""

    def __init__(self, task: Task):
        self.task = task

    def export(self, network: nn.Module, folder: Path) -> float:
        assert isinstance(network, networks.TextClassifier)
        tokenizer = self.task.prepared.path / tokens.TOKENIZER_FILE
        (folder / tokens.TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
        graph.export(network, folder / "model.onnx")
        texts = self.task.prepared.frame("test")[self.task.column].head(NUM_CHECKED_TEXTS)
        ids, lengths = tokens.encode(tokens.load(tokenizer), texts)
        return graph.difference(network, folder / "model.onnx", ids, lengths)

    def schema(self) -> Schema:
        return label_schema(self.task.project, self.task.prepared.preprocessor)

    def evaluate(self, bundle: Bundle, rows: np.ndarray | None = None) -> dict[str, Any]:
        test = self.task.prepared.frame("test", rows)
        return predictions.evaluate(self.task.project, test, bundle.predict(test))
