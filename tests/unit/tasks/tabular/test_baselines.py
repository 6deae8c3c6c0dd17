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
    """People whose age, hours and education say much about the label."""
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
    frame[LABEL] = (random.random(count) < 1 / (1 + np.exp(-score))).astype(np.float32)
    return frame


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine the threads of a small fit would only wait for one another."""
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
def test_each_learns_what_there_is_to_learn(prepared, features):
    scores = baselines_of(task_of(project(features), prepared))
    assert set(scores) == {"constant", "logistic_regression", "gradient_boosting"}
    assert scores["constant"]["auc"] == 0.5
    assert scores["constant"]["brier"] == pytest.approx(0.25, abs=0.02)
    for name in ("logistic_regression", "gradient_boosting"):
        assert scores[name]["auc"] > 0.6
        assert scores[name]["log_loss"] < scores["constant"]["log_loss"]


def test_values_unseen_in_training_and_a_column_that_is_all_missing_are_taken(prepared):
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


def test_is_done_once_for_each_prepared_data_set_and_seed(prepared, tmp_path):
    mixed = project(LAYOUTS["mixed"])
    first = candidate.baselines(task_of(mixed, prepared))
    shutil.rmtree(prepared.part("train"))
    assert candidate.baselines(task_of(mixed, prepared)) == first
    with pytest.raises(FileNotFoundError):
        candidate.baselines(task_of(mixed, prepared), fresh=True)
    with pytest.raises(FileNotFoundError):
        candidate.baselines(task_of(mixed.model_copy(update={"seed": 1}), prepared))
    another = Prepared(prepared.path.rename(tmp_path / "another"), cached=False)
    with pytest.raises(FileNotFoundError):
        candidate.baselines(task_of(mixed, another))
