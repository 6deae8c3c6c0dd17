"""The Python API, as a notebook uses it."""

import os

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from app import api
from app.errors import UserError
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def outcome(reach):
    return api.train(api.load(ROOT / "configs" / "smoke.yaml", "name=api", "training.num_workers=1"))


@pytest.fixture
def rows() -> pd.DataFrame:
    columns = {
        "age": [39, 52, 61],
        "workclass": ["Private", None, "no such class"],
        "educational-num": [13, 9, 10],
        "marital-status": ["Never-married", "Married-civ-spouse", "Divorced"],
        "gender": ["Male", "Female", "Female"],
        "hours-per-week": [40, 45.5, 20],
    }
    return pd.DataFrame(columns, index=["a", "b", "c"])


@pytest.mark.timeout(400)
def test_the_tour_notebook_runs(home, reach):
    notebook = nbformat.read(ROOT / "configs" / "tour.ipynb", as_version=4)
    folder = {"metadata": {"path": str(ROOT / "configs")}}
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources=folder).execute(
        env=dict(os.environ)
    )
    last = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert "probability" in last
    table = next(c for c in notebook.cells if "result.table()" in c.source).outputs[-1]["data"]["text/plain"]
    assert "complete" in table
    assert "training.learning_rate" in table


def test_predictions_keep_the_index_and_ignore_other_columns(outcome, rows):
    predictions = api.predict(outcome, rows)
    assert list(predictions.index) == ["a", "b", "c"]
    assert predictions["probability"].between(0, 1).all()
    again = api.predict(outcome.bundle, rows.iloc[1:2].assign(unused=1))
    assert again.loc["b", "probability"] == pytest.approx(predictions.loc["b", "probability"], abs=1e-6)


def test_a_registered_version_is_named_by_alias_or_number(outcome, rows):
    assert outcome.version is not None
    by_number = api.predict(f"api@{outcome.version.number}", rows)
    pd.testing.assert_frame_equal(by_number, api.predict(outcome, rows))
    with pytest.raises(UserError, match="no version 'nobody'"):
        api.predict("api@nobody", rows)


def test_rows_that_break_the_contract_are_named(outcome, rows):
    with pytest.raises(
        UserError, match=r"1 of 3 rows break the contract.*\n  row 'c': age: must not be missing"
    ):
        api.predict(outcome, rows.assign(age=[39, 52, np.nan]))


def test_a_missing_column_is_named(outcome, rows):
    with pytest.raises(UserError, match="gender"):
        api.predict(outcome, rows.drop(columns="gender"))


def test_a_mistake_in_a_project_or_argument_is_a_user_error():
    with pytest.raises(UserError, match="no such project file"):
        api.load("configs/none.yaml")
    project = api.load(ROOT / "configs" / "smoke.yaml")
    with pytest.raises(UserError, match="trials: must be a number from 1 to"):
        api.sweep(project, trials=0)
