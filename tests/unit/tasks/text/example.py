"""An example of a text classifier with a trained and with a frozen encoder, for the contract of all
families."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from app.config import Project
from app.data import tokens
from app.data.prepare import LABEL
from app.tasks.text.network import TextClassifier
from app.tasks.text.task import Task
from tests import encoders, texts

MODELS = {"text_classifier": {}, "frozen text_classifier": {"freeze": True}}


def project(name: str, folder: Path) -> Project:
    encoder = folder / "encoder"
    if not encoder.exists():
        encoders.build(encoder)
    return Project.model_validate(texts.project(encoder, **MODELS[name]))


def table() -> pa.Table:
    return pa.Table.from_pandas(texts.rows(400).drop(columns=LABEL), preserve_index=False)


def answers(task: Task, network: TextClassifier, frame: pd.DataFrame) -> np.ndarray:
    """The probabilities that a bundle must return, (rows, classes): one text at a time, without padding."""
    tokenizer = tokens.load(task.prepared.path / tokens.TOKENIZER_FILE)
    probabilities = []
    for text in frame[task.column]:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            probabilities.append(network(ids, torch.ones_like(ids)).numpy())
    return np.concatenate(probabilities)
