"""An example of each kind of tabular model, for the contract of all families."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from app.config import Project
from app.tasks.tabular.task import Task
from tests.bundles import PROJECT

MODELS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "hidden": [8], "dropout": 0.2, "numbers": {"embed": "linear", "width": 4}},
    "tabm": {"kind": "tabm", "hidden": [8], "members": 4, "numbers": {"embed": "periodic", "width": 4}},
}


def project(name: str, folder: Path) -> Project:
    training = {"num_workers": 1, "epochs": 4, "batch_size": 16, "learning_rate": 0.02}
    slices = {"slices": ["gender"]}
    return Project.model_validate(
        {**PROJECT, "model": MODELS[name], "training": training, "evaluation": slices}
    )


def people(count: int, seed: int) -> pd.DataFrame:
    """People whose income depends on their age, hours, education and a missing workclass."""
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": random.uniform(17, 90, count),
            "hours-per-week": np.where(random.random(count) < 0.1, np.nan, random.normal(40, 10, count)),
            "education": random.choice(["Bachelors", "Doctorate", "HS-grad"], count),
            "workclass": random.choice(np.array(["Private", "State-gov", None], dtype=object), count),
            "gender": random.choice(["Female", "Male"], count),
        }
    )
    score = (frame["age"] - 50) / 10 + (frame["hours-per-week"].fillna(40) - 40) / 5
    score += 3 * (frame["education"] == "Doctorate") + 2 * frame["workclass"].isna() - 1
    is_rich = random.random(count) < 1 / (1 + np.exp(-score))
    return frame.assign(income=np.where(is_rich, ">50K", "<=50K"))


def table() -> pa.Table:
    return pa.Table.from_pandas(people(700, seed=0), preserve_index=False)


def answers(task: Task, network: torch.nn.Module, frame: pd.DataFrame) -> np.ndarray:
    """The probabilities that a bundle must return, (rows,)."""
    with torch.no_grad():
        return network(torch.from_numpy(task.preprocessor.transform(frame))).numpy()
