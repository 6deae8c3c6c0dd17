import itertools
import json

import numpy as np
import pytest
import torch
from captum.attr import ShapleyValues

from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.serving.http import Refused
from app.serving.protocols import explain
from app.serving.protocols.contract import Answer, Query
from app.serving.protocols.explain import Walks
from tests.bundles import ROWS, build


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle(build(tmp_path_factory.mktemp("bundle") / "b", seed=1))


def function(a, b, c, d):
    return a * b + torch.sin(c) * d - 0.5 * a * c * d


def as_columns(rows: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip("abcd", rows.T, strict=True))


def test_all_permutations_give_the_exact_shapley_values():
    random = np.random.default_rng(0)
    rows, start = random.normal(size=(3, 4)), random.normal(size=4)
    permutations = np.array(list(itertools.permutations(range(4))))
    walks = Walks(permutations, as_columns(np.repeat(start[None], len(permutations), axis=0)))
    points = walks.points(as_columns(rows))
    outputs = function(*(torch.tensor(points[name]) for name in "abcd")).numpy()
    base, output, by_column = walks.attributions(outputs)
    exact = ShapleyValues(lambda x: function(*x.T)).attribute(
        torch.tensor(rows), baselines=torch.tensor(start)[None]
    )
    np.testing.assert_allclose(by_column, exact.numpy(), atol=1e-6)  # float32
    np.testing.assert_allclose(output, function(*torch.tensor(rows).T).numpy(), atol=1e-12)
    np.testing.assert_allclose(base, function(*torch.tensor(start)).item(), atol=1e-12)


def test_sampled_walks_approximate_the_values_and_always_sum_to_the_output():
    random = np.random.default_rng(1)
    rows, start = random.normal(size=(20, 4)), random.normal(size=4)
    permutations = explain.sample_permutations(4)
    assert (np.sort(permutations, axis=1) == np.arange(4)).all()
    walks = Walks(permutations, as_columns(np.repeat(start[None], len(permutations), axis=0)))
    points = walks.points(as_columns(rows))
    base, output, by_column = walks.attributions(
        function(*(torch.tensor(points[name]) for name in "abcd")).numpy()
    )
    np.testing.assert_allclose(base + by_column.sum(axis=1), output, atol=1e-12)
    exact = ShapleyValues(lambda x: function(*x.T)).attribute(
        torch.tensor(rows), baselines=torch.tensor(start)[None]
    )
    assert np.abs(by_column - exact.numpy()).mean() < 0.1 * np.abs(exact.numpy()).mean()


def explain_rows(bundle, probabilities=None):
    """The explanation of ROWS, and their predictions; `probabilities` replace those of the answer."""
    walks = explain.load_walks(bundle.path, bundle.schema)
    columns = columns_of(bundle.schema, ROWS)
    predicted = bundle.predict(columns)
    answer = Answer(
        model="income",
        variant="champion",
        version="1",
        request_id="r",
        probabilities=predicted if probabilities is None else probabilities,
    )
    points = bundle.predict(walks.points(columns))
    return json.loads(explain.encode(answer, bundle.schema, walks, points)), predicted


def test_an_explanation_attributes_the_output_to_the_raw_columns(bundle):
    document, probabilities = explain_rows(bundle)
    assert document["of"] == "log-odds of >50K"
    for explanation, p in zip(document["explanations"], probabilities, strict=True):
        assert set(explanation["attributions"]) == set(ROWS[0])
        assert explanation["output"] == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
        total = explanation["base"] + sum(explanation["attributions"].values())
        assert total == pytest.approx(explanation["output"], abs=1e-9)
    assert len({e["base"] for e in document["explanations"]}) == 1


def test_attributions_that_do_not_sum_to_the_answer_are_never_sent(bundle):
    with pytest.raises(RuntimeError, match="must sum to the output"):
        explain_rows(bundle, probabilities=np.full(len(ROWS), 0.9, dtype=np.float32))


def test_only_tabular_models_are_explained(bundle):
    ranking = bundle.schema.model_copy(update={"task": "ranking"})
    with pytest.raises(Refused, match="only predictions of tabular models"):
        explain.load_walks(bundle.path, ranking)


def test_a_wide_table_has_fewer_rows_per_request():
    """The number of points grows with the square of the columns: 16 rows of 1,000 columns would take 4 GB."""
    assert explain.max_rows(1) == explain.max_rows(14) == explain.MAX_ROWS
    assert explain.max_rows(1_000) == 1
    for num_columns in range(1, 400):
        cells = explain.max_rows(num_columns) * explain.NUM_WALKS * (num_columns + 1) * num_columns
        assert cells <= explain.MAX_CELLS


def test_too_many_rows_are_refused(bundle):
    limit = explain.max_rows(len(bundle.schema.inputs))
    explain.require_num_rows(Query({}, limit, None), bundle.schema)
    with pytest.raises(Refused, match=f"at most {limit}, not {limit + 1}"):
        explain.require_num_rows(Query({}, limit + 1, None), bundle.schema)
