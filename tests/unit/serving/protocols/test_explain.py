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


def test_with_all_permutations_the_values_are_the_exact_ones():
    random = np.random.default_rng(0)
    rows, start = random.normal(size=(3, 4)), random.normal(size=4)
    orders = np.array(list(itertools.permutations(range(4))))
    walks = Walks(orders, as_columns(np.repeat(start[None], len(orders), axis=0)))
    points = walks.points(as_columns(rows))
    outputs = function(*(torch.tensor(points[name]) for name in "abcd")).numpy()
    base, reached, added = walks.attributions(outputs)
    exact = ShapleyValues(lambda x: function(*x.T)).attribute(
        torch.tensor(rows), baselines=torch.tensor(start)[None]
    )
    np.testing.assert_allclose(added, exact.numpy(), atol=1e-6)  # float32
    np.testing.assert_allclose(reached, function(*torch.tensor(rows).T).numpy(), atol=1e-12)
    np.testing.assert_allclose(base, function(*torch.tensor(start)).item(), atol=1e-12)


def test_sampled_walks_come_near_and_always_sum():
    random = np.random.default_rng(1)
    rows, start = random.normal(size=(20, 4)), random.normal(size=4)
    orders = explain.orders(4)
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    walks = Walks(orders, as_columns(np.repeat(start[None], len(orders), axis=0)))
    points = walks.points(as_columns(rows))
    base, reached, added = walks.attributions(
        function(*(torch.tensor(points[name]) for name in "abcd")).numpy()
    )
    np.testing.assert_allclose(base + added.sum(axis=1), reached, atol=1e-12)
    exact = ShapleyValues(lambda x: function(*x.T)).attribute(
        torch.tensor(rows), baselines=torch.tensor(start)[None]
    )
    assert np.abs(added - exact.numpy()).mean() < 0.1 * np.abs(exact.numpy()).mean()


def explained(bundle, probabilities=None):
    walks = explain.walks(bundle.path, bundle.schema)
    columns = columns_of(bundle.schema, ROWS)
    given = bundle.predict(columns) if probabilities is None else probabilities
    answer = Answer(model="income", variant="champion", version="1", request_id="r", probabilities=given)
    points = bundle.predict(walks.points(columns))
    return json.loads(explain.encode(answer, bundle.schema, walks, points)), bundle.predict(columns)


def test_a_bundle_is_explained_by_its_raw_columns(bundle):
    document, probabilities = explained(bundle)
    assert document["of"] == "log-odds of >50K"
    for explanation, p in zip(document["explanations"], probabilities, strict=True):
        assert set(explanation["attributions"]) == set(ROWS[0])
        assert explanation["output"] == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
        total = explanation["base"] + sum(explanation["attributions"].values())
        assert total == pytest.approx(explanation["output"], abs=1e-9)
    assert len({e["base"] for e in document["explanations"]}) == 1


def test_sums_that_are_not_the_answer_are_never_told(bundle):
    with pytest.raises(RuntimeError, match="sum to something else"):
        explained(bundle, probabilities=np.full(len(ROWS), 0.9, dtype=np.float32))


def test_what_is_no_table_is_not_explained(bundle):
    ranking = bundle.schema.model_copy(update={"task": "ranking"})
    with pytest.raises(Refused, match="tables"):
        explain.walks(bundle.path, ranking)


def test_wide_tables_have_fewer_rows_explained_at_once():
    """The points grow with the square of the columns; 16 rows of 1,000 columns would be 4 GB."""
    assert explain.max_rows(1) == explain.max_rows(14) == explain.MAX_ROWS
    assert explain.max_rows(1_000) == 1
    for num_columns in range(1, 400):
        cells = explain.max_rows(num_columns) * explain.NUM_WALKS * (num_columns + 1) * num_columns
        assert cells <= explain.MAX_CELLS


def test_more_rows_are_refused(bundle):
    most = explain.max_rows(len(bundle.schema.inputs))
    explain.check(Query({}, most, None), bundle.schema)
    with pytest.raises(Refused, match=f"at most {most}"):
        explain.check(Query({}, most + 1, None), bundle.schema)
