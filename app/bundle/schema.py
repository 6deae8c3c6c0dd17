"""The schema of a bundle: the contract of each input, the labels and the outputs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from app.config import Category, Column, Project
from app.data.cells import Cells, cells_of
from app.data.features import MISSING, Categories, Preprocessor

MAX_ITEMS = 100
"""Maximum number of items that a ranking has for a user."""


class Input(BaseModel):
    """A raw column that the model takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    contract: Column
    known: list[str] | None
    """Values of a category in the training part; None for other columns."""

    @property
    def allowed(self) -> list[str] | None:
        """Values that a request may have; None if all are allowed."""
        if not isinstance(self.contract, Category):
            return None
        return self.known or [] if self.contract.unseen == "refuse" else self.contract.values


class Schema(BaseModel):
    """Inputs and outputs of a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    """Name of the registered model."""
    task: Literal["binary", "classes", "ranking"] = "binary"
    """Kind of answer: the probability of a positive label, a probability for each class, or a ranking of
    items."""
    inputs: list[Input]
    missing: list[str] = []
    """Strings that mean a missing value, besides null and the empty string."""
    label: str
    """Column that is predicted; in a ranking, the column of the items."""
    positive: str = ""
    """Label whose probability is predicted, in a binary task."""
    negatives: list[str] = []
    """The other labels in the training data, in a binary task; empty if there are many."""
    above: float | None = None
    """Threshold above which the label counts as positive, in a binary task that has one."""
    classes: list[str] = []
    """Names of the classes, in the order of the graph's output."""
    num_items: int = 0
    """Number of items that the graph ranks for a user, in a ranking."""

    def cells(self) -> dict[str, Cells]:
        """The reader of each input's cells."""
        return {i.name: cells_of(i.contract, self.missing, i.allowed) for i in self.inputs}


def schema_at(path: Path) -> Schema:
    """Read the schema of the bundle in a folder."""
    schema = Schema.model_validate_json((path / "schema.json").read_text())
    project = path / "project.json"
    if "missing" not in schema.model_fields_set and project.exists():
        # Bundles of earlier releases have these strings in their project file only.
        missing = json.loads(project.read_text())["data"]["missing"]
        schema = schema.model_copy(update={"missing": missing})
    return schema


def label_schema(project: Project, preprocessor: Preprocessor, labels: Sequence[str] = ()) -> Schema:
    """Make the schema of a bundle that predicts the project's label.

    `labels` are the label's values in the training data. Only a binary label needs them.
    """
    label = project.data.target
    known = {
        column.column: [value for value in column.values if value != MISSING]
        for column in preprocessor.columns
        if isinstance(column, Categories)
    }
    inputs = [
        Input(name=name, contract=project.data.columns[name], known=known.get(name))
        for name in project.features
    ]
    outputs: dict[str, Any]
    if label.classes:
        outputs = {"task": "classes", "classes": label.classes}
    else:
        negatives = [value for value in labels if value != label.outcome]
        outputs = {
            "task": "binary",
            "positive": label.outcome,
            "negatives": negatives,
            "above": label.above,
        }
    missing = project.data.missing
    return Schema(name=project.name, inputs=inputs, missing=missing, label=label.column, **outputs)


def columns_of(schema: Schema, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Convert rows of values that Cells has read to columns for `Bundle.predict`.

    A value is missing if it is None or the row has no such key.
    """
    columns = {}
    for item in schema.inputs:
        values = [row.get(item.name) for row in rows]
        columns[item.name] = np.array(values, dtype=np.float64 if item.contract.type == "number" else object)
    return columns
