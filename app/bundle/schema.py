"""What a bundle takes and gives: the contract of each input, the labels, the outputs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from app.config import Category, Column, Project
from app.data.cells import Cells
from app.data.features import MISSING, Categories, Preprocessor

MAX_ITEMS = 100
"""Items of a recommender's answer."""


class Input(BaseModel):
    """A raw column that the model takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    contract: Column
    known: list[str] | None
    """Of a category: the values of the training part."""

    @property
    def allowed(self) -> list[str] | None:
        """The values that a row to be predicted may have; None if any."""
        if not isinstance(self.contract, Category):
            return None
        return self.known or [] if self.contract.unseen == "refuse" else self.contract.values


class Schema(BaseModel):
    """What goes into the model and what comes out."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """The registered model's."""
    task: Literal["binary", "classes", "ranking"] = "binary"
    inputs: list[Input]
    missing: list[str] = []
    """Strings that stand for a missing value, beside null and the empty string."""
    label: str
    """The column that is predicted; of a ranking, the items'."""
    positive: str = ""
    """Of a binary task: what counts as 1."""
    negatives: list[str] = []
    """Of a binary task: the label's other values in training; empty if there are many."""
    above: float | None = None
    """Of a binary task with a threshold: the number beyond which a value counts as 1."""
    classes: list[str] = []
    """Of several classes: their names, in the order of the graph's output."""
    num_items: int = 0
    """Of a ranking: how many items the graph gives."""

    def cells(self) -> dict[str, Cells]:
        """The reader of each input's cells."""
        return {i.name: Cells(i.contract, self.missing, i.allowed) for i in self.inputs}


def schema_at(path: Path) -> Schema:
    """What the bundle in a folder takes and gives."""
    schema = Schema.model_validate_json((path / "schema.json").read_text())
    project = path / "project.json"
    if "missing" not in schema.model_fields_set and project.exists():
        # Older bundles have the markers in their project alone.
        missing = json.loads(project.read_text())["data"]["missing"]
        schema = schema.model_copy(update={"missing": missing})
    return schema


def schema_of(project: Project, preprocessor: Preprocessor, labels: Sequence[str] = ()) -> Schema:
    """What the bundle of a project takes and gives; `labels` are the label's values in training."""
    known = {
        c.column: [v for v in c.values if v != MISSING]
        for c in preprocessor.columns
        if isinstance(c, Categories)
    }
    label = project.data.target
    return Schema(
        name=project.name,
        task="binary" if label.classes is None else "classes",
        inputs=[
            Input(name=n, contract=project.data.columns[n], known=known.get(n)) for n in project.features
        ],
        missing=project.data.missing,
        label=label.column,
        positive=label.outcome if label.classes is None else "",
        negatives=[value for value in labels if value != label.outcome] if label.classes is None else [],
        above=label.above,
        classes=label.classes or [],
    )


def columns_of(schema: Schema, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows that were read before, by column, as `Bundle.predict` takes them.

    None or an absent key is missing.
    """
    columns = {}
    for item in schema.inputs:
        values = [row.get(item.name) for row in rows]
        columns[item.name] = np.array(values, dtype=np.float64 if item.contract.type == "number" else object)
    return columns
