import copy
import shutil

import numpy as np
import pandas as pd
import pytest
import sklearn.ensemble  # noqa: F401
from threadpoolctl import threadpool_limits

from app.config import Project
from app.data.prepare import LABEL, Prepared
from app.jobs import candidate
from app.tasks import baselines_of, task_of
from tests.bundles import PROJECT
from tests.unit.tasks.tabular.example import people

LAYOUTS = {
    "mixed": list(PROJECT["features"]),
    "numbers": ["age", "hours-per-week"],
    "categories": ["education", "workclass"],
}


def project(features: list[str]) -> Project:
    document = copy.deepcopy(PROJECT)
    document["features"] = {name: PROJECT["features"][name] for name in features}
    return Project.model_validate(document)


def rows(count: int, seed: int) -> pd.DataFrame:
    """A prepared part."""
    frame = people(count, seed)
    return frame.assign(**{LABEL: (frame.pop("income") == ">50K").astype(np.float32)})


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: on a busy machine the threads of a small fit spend their time waiting for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def prepared(tmp_path):
    for part, count, seed in (("train", 300, 0), ("test", 200, 1)):
        (tmp_path / "prepared" / part).mkdir(parents=True)
        rows(count, seed).to_parquet(tmp_path / "prepared" / part / "0.parquet")
    (tmp_path / "prepared" / "preprocessor.json").write_text('{"columns": []}')
    return Prepared(tmp_path / "prepared", cached=False)


@pytest.mark.parametrize("features", LAYOUTS.values(), ids=LAYOUTS)
def test_every_baseline_beats_the_constant(prepared, features):
    scores = baselines_of(task_of(project(features), prepared))
    assert set(scores) == {"constant", "logistic_regression", "gradient_boosting"}
    assert scores["constant"]["auc"] == 0.5
    assert scores["constant"]["brier"] == pytest.approx(0.25, abs=0.02)
    for name in ("logistic_regression", "gradient_boosting"):
        assert scores[name]["auc"] > 0.6
        assert scores[name]["log_loss"] < scores["constant"]["log_loss"]


def test_unseen_values_and_a_column_without_values_are_accepted(prepared):
    for part in ("train", "test"):
        file = prepared.part(part) / "0.parquet"
        frame = pd.read_parquet(file).assign(**{"hours-per-week": np.nan})
        frame["education"] = frame["education"].astype(object)
        if part == "test":
            frame.loc[:20, "education"] = "never seen"
        frame.to_parquet(file)
    scores = baselines_of(task_of(project(LAYOUTS["mixed"]), prepared))
    assert scores["logistic_regression"]["auc"] > 0.7
    assert scores["gradient_boosting"]["auc"] > 0.7


def test_the_stage_runs_once_for_each_prepared_data_set_and_seed(prepared, tmp_path):
    mixed = project(LAYOUTS["mixed"])
    scores = candidate.baselines(task_of(mixed, prepared))
    shutil.rmtree(prepared.part("train"))
    assert candidate.baselines(task_of(mixed, prepared)) == scores
    with pytest.raises(FileNotFoundError):
        candidate.baselines(task_of(mixed, prepared), fresh=True)
    with pytest.raises(FileNotFoundError):
        candidate.baselines(task_of(mixed.model_copy(update={"seed": 1}), prepared))
    another = Prepared(prepared.path.rename(tmp_path / "another"), cached=False)
    with pytest.raises(FileNotFoundError):
        candidate.baselines(task_of(mixed, another))
