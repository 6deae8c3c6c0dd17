"""An example of each kind of recommender, for the contract of all families."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from app.config import Project
from app.tasks.recommender.graph import LOWEST
from app.tasks.recommender.network import Recommender
from app.tasks.recommender.task import Task

NUM_USERS, NUM_ITEMS = 30, 40
PROJECT: dict[str, Any] = {
    "name": "films",
    "data": {
        "source": {"path": "unused.parquet"},
        "interactions": {"user": "who", "item": "what", "time": "when", "rating": "stars"},
        "columns": {
            "who": {"type": "category", "unseen": "ignore"},
            "what": {"type": "category"},
            "stars": {"type": "number", "min": 1, "max": 5},
        },
    },
    "model": {"kind": "mf", "width": 8, "negatives": 16},
    "training": {"num_workers": 1, "epochs": 30, "batch_size": 64, "learning_rate": 0.05},
    "gate": {"metric": "hr@10", "beat": ["popularity"]},
    "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
}
MODELS: dict[str, dict[str, Any]] = {
    "mf": PROJECT["model"],
    "mf of ratings": {**PROJECT["model"], "feedback": "explicit"},
    "ncf": {"kind": "ncf", "width": 8, "hidden": [8, 4], "negatives": 16},
}


def project(name: str, folder: Path) -> Project:
    return Project.model_validate({**PROJECT, "model": MODELS[name]})


def table() -> pa.Table:
    """Interactions of users of two kinds, each with 12 of the 20 items of that kind."""
    random = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item + user % 2 * NUM_ITEMS // 2}", float(1 + item % 5), float(place))
        for user in range(NUM_USERS)
        for place, item in enumerate(random.permutation(NUM_ITEMS // 2)[:12])
    ]
    names = ("who", "what", "stars", "when")
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def answers(task: Task, network: Recommender, frame: pd.DataFrame) -> np.ndarray:
    """The scores that a bundle must return, (users, items)."""
    users = torch.from_numpy(task.catalogue.user_indices(frame[task.columns.user]))
    with torch.no_grad():
        scores = network(users).masked_fill(task.seen_in("train", "validation")[users], LOWEST)
    return scores.sort(dim=1, descending=True).values.numpy()
