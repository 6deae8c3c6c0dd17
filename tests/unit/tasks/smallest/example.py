import numpy as np
import pyarrow as pa

from app.config import Project
from tests.unit.tasks.smallest.settings import Threshold

KINDS = (Threshold,)
MODELS = {"threshold": {"kind": "threshold", "slope": -0.5}}


class ThresholdProject(Project):
    """A project file, if FAMILIES had the family when `Project` was defined."""

    model: Threshold


def project(name, folder):
    return ThresholdProject.model_validate(
        {
            "name": "tall",
            "data": {
                "source": {"path": "unused.parquet"},
                "label": {"column": "is_tall", "positive": "yes"},
                "columns": {"height": {"type": "number"}},
            },
            "features": {"height": {"encode": "min_max"}},
            "model": MODELS[name],
            "training": {"num_workers": 1, "epochs": 4, "batch_size": 16, "learning_rate": 0.1},
            "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
        }
    )


def table():
    random = np.random.default_rng(0)
    height = random.normal(size=400)
    is_tall = height + random.normal(scale=0.5, size=400) > 0.5
    return pa.table({"height": height, "is_tall": np.where(is_tall, "yes", "no")})


def answers(task, network, frame):
    x = frame["height"].to_numpy()
    return 1 / (1 + np.exp(-(network.slope.item() * x + network.offset.item())))
