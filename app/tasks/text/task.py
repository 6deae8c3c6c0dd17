"""The task of text classifiers, with a label of several classes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from app.config import Project
from app.config.families.text import TextClassifier
from app.data import buckets, tokens
from app.data.prepare import LABEL, Prepared
from app.evaluation import metrics
from app.tasks import Arrays
from app.tasks.text import network as networks

TEXTS_PER_BATCH = 64
"""Number of texts in a forward pass outside training."""


class Task:
    """See `app.tasks.task.Task`."""

    def __init__(self, project: Project, prepared: Prepared):
        assert isinstance(project.model, TextClassifier)
        self.project = project
        self.score = project.model.score
        self.prepared = prepared
        self.model = project.model
        self.classes = project.data.target.classes or []
        (self.column,) = project.features

    def arrays(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Tokens and labels: `ids` int32 (rows, longest) and `lengths` int (rows,), `y` int64 and `weight`
        float32, both (rows,).

        A frozen encoder has `vectors` float32 (rows, hidden) instead of `ids` and `lengths`.
        """
        y = np.array(frame[LABEL], dtype=np.int64)
        labels = {"y": y, "weight": self._class_weights()[y]}
        ids, lengths = tokens.encode(
            tokens.load(self.prepared.path / tokens.TOKENIZER_FILE), frame[self.column]
        )
        if not self.model.freeze:
            return {"ids": ids.astype(np.int32), "lengths": lengths, **labels}
        network = self.network().eval()
        with torch.no_grad():
            vectors = _by_length(network.vectors, torch.from_numpy(ids), torch.from_numpy(lengths))
        return {"vectors": vectors.numpy(), **labels}

    def _class_weights(self) -> np.ndarray:
        """The weight of a row in the loss by its class, float32 (classes,)."""
        if self.project.training.class_weights == "none":
            return np.ones(len(self.classes), dtype=np.float32)
        return self.prepared.balanced_weights()

    def network(self) -> networks.TextClassifier:
        encoder = networks.load_encoder(tokens.encoder_folder(self.model.encoder))
        kind = networks.FrozenTextClassifier if self.model.freeze else networks.TextClassifier
        return kind(encoder, len(self.classes), self.model.dropout)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        assert isinstance(network, networks.TextClassifier)
        return networks.parameter_groups(network, self.model.layer_decay)

    def arrange(self, arrays: Arrays, order: Tensor, batch_size: int) -> Tensor:
        if self.model.freeze:
            return order
        return buckets.bucket_by_length(arrays["lengths"], order.to(arrays["lengths"].device), batch_size)

    def batch(self, arrays: Arrays, rows: Tensor) -> tuple[Tensor, ...]:
        """`ids`, `mask`, `y` and `weight` of these rows; `vectors` instead of the first two if the encoder is
        frozen."""
        y, weight = arrays["y"][rows], arrays["weight"][rows]
        if self.model.freeze:
            return arrays["vectors"][rows], y, weight
        return *tokens.pad(arrays["ids"][rows].long(), arrays["lengths"][rows]), y, weight

    def outputs(self, network: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
        """Probabilities (rows, classes) and labels (rows,)."""
        assert isinstance(network, networks.TextClassifier)
        if self.model.freeze:
            return network.probabilities(arrays["vectors"]), arrays["y"]
        return _by_length(network, arrays["ids"], arrays["lengths"]), arrays["y"]

    def metrics(self, *outputs: Tensor) -> dict[str, float]:
        """Log loss and macro F1."""
        probabilities, labels = (output.numpy() for output in outputs)
        if not np.isfinite(probabilities).all():
            return {"loss": math.nan, "macro_f1": math.nan}
        evaluation = metrics.evaluate_classes(labels, probabilities.astype(np.float64))
        return {"loss": evaluation["log_loss"], "macro_f1": evaluation["macro_f1"]}


def _by_length(forward: Callable[[Tensor, Tensor], Tensor], ids: Tensor, lengths: Tensor) -> Tensor:
    """`forward(ids, mask)` of all rows, float32, computed in batches of similar length."""
    order = lengths.argsort(stable=True)
    outputs = [
        forward(*tokens.pad(ids[rows].long(), lengths[rows])).float() for rows in order.split(TEXTS_PER_BATCH)
    ]
    return torch.cat(outputs)[order.argsort()]
