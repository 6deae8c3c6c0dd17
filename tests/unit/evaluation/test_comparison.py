"""Whether a candidate can be compared with a champion, and on which rows."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from app.config import Project
from app.data import split
from app.data.partition import PARTITION_FILE, partition_of, with_partition_key
from app.data.prepare import LABEL, Prepared
from app.evaluation.comparison import MIN_ROWS, Comparison, NotComparable, compare, differences
from tests.bundles import PROJECT

TABLE = pd.DataFrame(
    {
        "age": np.random.default_rng(0).uniform(0, 120, 10_000),
        "hours-per-week": np.random.default_rng(1).uniform(0, 99, 10_000),
        "education": np.random.default_rng(2).choice(["Bachelors", "HS-grad"], 10_000),
        "workclass": np.random.default_rng(3).choice(["Private", None], 10_000),
        "gender": np.random.default_rng(4).choice(["Female", "Male"], 10_000),
        "new": np.random.default_rng(5).uniform(0, 1, 10_000),
        LABEL: np.random.default_rng(6).integers(0, 2, 10_000).astype(np.float32),
        split.TIME: np.arange(10_000.0),
    }
)
MOVIES = {
    **PROJECT,
    "data": {
        "source": {"path": "unused.parquet"},
        "interactions": {"user": "who", "item": "what", "time": "when", "rating": "stars"},
        "columns": {
            n: {"type": t} for n, t in (("who", "category"), ("what", "category"), ("stars", "number"))
        },
    },
    "features": {},
    "model": {"kind": "mf", "width": 4},
    "gate": {"metric": "hr@10", "beat": []},
}


def changed(base=PROJECT, **changes) -> Project:
    """The project with some keys changed. `__` in a name stands for a dot; None removes the key."""
    document = copy.deepcopy(base)
    for key, value in changes.items():
        *path, last = key.split("__")
        section = document
        for part in path:
            section = section.setdefault(part, {})
        if value is None:
            del section[last]
        else:
            section[last] = value
    return Project.model_validate(document)


def parts_of(project: Project, table: pd.DataFrame):
    """The part of each row, as `prepare` assigns it, and the times at which the later parts start."""
    data, starts = project.data, None
    if data.split.by == "time":
        times = table[split.TIME].to_numpy()
        starts = split.part_starts(times, np.ones(len(times)), data.split)
    return split.assign_parts(table, data.split, data.split_key, starts), starts


def champion(folder: Path, project: Project, table: pd.DataFrame = TABLE):
    """The files of a bundle that a comparison reads, and the rows on which it was trained."""
    folder.mkdir()
    (folder / "project.json").write_text(project.model_dump_json())
    parts, starts = parts_of(project, table)
    partition = partition_of(project.data, starts)
    (folder / PARTITION_FILE).write_text(partition.model_dump_json())
    return SimpleNamespace(path=folder), set(table.index[parts < 2])


def compared(tmp_path, candidate: Project, incumbent: Project, table: pd.DataFrame = TABLE):
    """The result of a comparison, and the calls of `evaluate` with their rows."""
    parts, _ = parts_of(candidate, table)
    prepared = tmp_path / "prepared"
    (prepared / "test").mkdir(parents=True)
    test = table[parts == 2]
    test.to_parquet(prepared / "test" / "0.parquet", index=False)
    opened, seen = champion(tmp_path / "champion", incumbent)
    calls = []

    def evaluate(bundle, rows):
        calls.append((bundle, set(test.index[rows])))
        return {"auc": 0.5}

    (prepared / "project.json").write_text(candidate.model_dump_json())
    result = compare(Prepared(prepared, cached=True), SimpleNamespace(path=prepared), opened, evaluate)
    for _, rows in calls:
        assert not rows & seen, "a model must not be evaluated on rows that it was trained on"
    return result, calls


COLUMNS = PROJECT["data"]["columns"]
MORE = {"data__columns": {**COLUMNS, "new": {"type": "number"}}}
BY_TIME = {"by": "time", "column": "day"}


def test_another_seed_is_compared_on_the_same_rows(tmp_path):
    result, calls = compared(tmp_path, changed(seed=7), changed())
    assert isinstance(result, Comparison)
    assert result.num_rows == result.num_test_rows == pytest.approx(2000, abs=150)
    assert calls[0][1] == calls[1][1]


def test_one_more_column_is_compared_on_the_same_rows(tmp_path):
    incumbent = changed()
    partition = partition_of(incumbent.data, None)
    candidate = changed(**MORE)
    candidate = candidate.model_copy(update={"data": with_partition_key(candidate.data, partition)})
    result, _ = compared(tmp_path, candidate, incumbent)
    assert isinstance(result, Comparison)
    assert result.num_rows == result.num_test_rows


@pytest.mark.parametrize(
    ("candidate", "incumbent", "share"),
    [
        (changed(**MORE, data__split={"key": ["new"]}), changed(), 0.2),
        (changed(data__split={"seed": 1}), changed(), 0.2),
        (changed(data__split={"test": 0.4}), changed(), 0.5),
        (changed(data__split={"test": 0.1}), changed(data__split={"test": 0.4}), 1),
        (changed(data__split=BY_TIME), changed(), 0.2),
        (changed(data__split={**BY_TIME, "test": 0.4}), changed(data__split=BY_TIME), 0.5),
        (changed(), changed(data__split={"fold": [1, 3], "test": 0.2}), 1),
    ],
)
def test_rows_on_which_the_champion_was_trained_are_left_out(tmp_path, candidate, incumbent, share):
    result, _ = compared(tmp_path, candidate, incumbent)
    assert isinstance(result, Comparison)
    assert result.num_rows / result.num_test_rows == pytest.approx(share, abs=0.05)


def test_too_few_unseen_rows_are_not_compared(tmp_path):
    result, calls = compared(tmp_path, changed(data__split={"seed": 1}), changed(), TABLE.head(2000))
    assert isinstance(result, NotComparable)
    assert f"a comparison needs {MIN_ROWS}" in result.reason
    assert "the champion was trained on 8" in result.reason
    assert not calls


def test_too_few_rows_of_a_label_are_not_compared(tmp_path):
    rare = TABLE.assign(**{LABEL: (TABLE.index % 250 == 0).astype(np.float32)})
    result, _ = compared(tmp_path, changed(data__split={"seed": 1}), changed(), rare)
    assert isinstance(result, NotComparable)
    assert "with some label are left" in result.reason


def test_a_small_test_part_is_compared_as_a_whole(tmp_path):
    result, _ = compared(tmp_path, changed(seed=1), changed(), TABLE.head(300))
    assert isinstance(result, Comparison)
    assert result.num_rows < MIN_ROWS


def test_a_bundle_without_its_partition_is_not_compared(tmp_path):
    opened, _ = champion(tmp_path / "old", changed())
    candidate, _ = champion(tmp_path / "new", changed())
    (opened.path / PARTITION_FILE).unlink()
    prepared = Prepared(tmp_path, cached=True)
    (tmp_path / "test").mkdir()
    TABLE.head(9).to_parquet(tmp_path / "test" / "0.parquet")
    result = compare(prepared, candidate, opened, lambda *_: {})
    assert result == NotComparable("its bundle has no record of the rows on which it was trained")
    (opened.path / "project.json").write_text('{"name": "of a later release"}')
    result = compare(prepared, candidate, opened, lambda *_: {})
    assert result == NotComparable("this release cannot read the champion's project.json")


WITHOUT_AGE = {n: c for n, c in COLUMNS.items() if n != "age"}
FEATURES = PROJECT["features"]
AS_CATEGORY = {**COLUMNS, "age": {"type": "category"}}


@pytest.mark.parametrize(
    ("candidate", "incumbent", "expected"),
    [
        (changed(seed=3, **MORE), changed(), []),
        (changed(model={"kind": "linear"}), changed(), []),
        (changed(data__columns={**COLUMNS, "age": {"type": "number", "nullable": True}}), changed(), []),
        (
            changed(data__columns=AS_CATEGORY, features={**FEATURES, "age": {"encode": "one_hot"}}),
            changed(),
            ["its input 'age' was a number and is a category"],
        ),
        (
            changed(data__columns=WITHOUT_AGE, features={"gender": {"encode": "one_hot"}}),
            changed(),
            ["its input 'age' is no longer in data.columns"],
        ),
        (changed(features={"age": {"encode": "min_max"}}), changed(), []),
        (
            changed(data__label={"column": "income", "positive": "<=50K"}),
            changed(),
            ["data.label.positive was '>50K' and is '<=50K'"],
        ),
        (
            changed(data__label={"column": "wage", "positive": ">50K"}),
            changed(),
            ["data.label.column was 'income' and is 'wage'"],
        ),
        (
            changed(data__label={"column": "income", "above": 15.0000001}),
            changed(data__label={"column": "income", "above": 15}),
            ["data.label.above was 15.0 and is 15.0000001"],
        ),
        (changed(data__missing=["?"]), changed(), ["data.missing was [] and is ['?']"]),
        (changed(MOVIES), changed(), ["data.label was given"]),
        (changed(), changed(MOVIES), ["data.label was not given"]),
        (changed(MOVIES, model__width=8), changed(MOVIES), []),
        (changed(MOVIES, model__feedback="explicit"), changed(MOVIES), []),
        (
            changed(MOVIES, model__feedback="explicit", gate__metric="r2"),
            changed(MOVIES),
            ["its model has no r2"],
        ),
    ],
)
def test_differences_of_contracts_are_named(candidate, incumbent, expected):
    assert differences(candidate, incumbent) == expected


def test_models_with_different_contracts_are_not_evaluated(tmp_path):
    flipped = changed(data__label={"column": "income", "positive": "<=50K"})
    result, calls = compared(tmp_path, flipped, changed())
    assert isinstance(result, NotComparable)
    assert result.reason == "its contract differs: data.label.positive was '>50K' and is '<=50K'"
    assert not calls
