"""Fitting a preprocessor on the statistics of blocks."""

import json

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter

from app.config import Encoding
from app.data import fitting
from app.data.features import Preprocessor
from app.data.fitting import block_statistics, fit


def encodings(**features) -> dict[str, Encoding]:
    return TypeAdapter(dict[str, Encoding]).validate_python(features)


FEATURES = encodings(
    town={"encode": "embedding", "width": 3},
    age={"encode": "min_max"},
    job={"encode": "one_hot"},
    pay={"encode": "min_max"},
    rent={"encode": "quantile", "bins": 20, "exact": 4},
    debt={"encode": "piecewise_linear", "bins": 5},
)


def rows(count: int, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    pay = random.lognormal(8, 2, count)
    return pd.DataFrame(
        {
            "age": random.integers(17, 90, count).astype(float),
            "pay": np.where(random.random(count) < 0.2, np.nan, pay),
            "rent": np.round(pay, -3),
            "debt": np.where(random.random(count) < 0.5, 0.0, random.normal(0, 1e4, count)),
            "job": random.choice(np.array(["cook", "smith", "ärztin", None], dtype=object), count),
            "town": random.choice(np.array([f"town {i}" for i in range(20)], dtype=object), count),
        }
    )


def fitted(frame: pd.DataFrame, features: dict[str, Encoding] = FEATURES) -> Preprocessor:
    return fit([block_statistics(frame, features)], features)


@pytest.mark.parametrize("seed", range(20))
def test_any_blocks_give_the_same_preprocessor(seed):
    random = np.random.default_rng(seed)
    frame = rows(int(random.integers(1, 200)), seed)
    cuts = np.sort(random.integers(0, len(frame) + 1, random.integers(0, 6)))
    blocks = [frame.iloc[a:b] for a, b in zip([0, *cuts], [*cuts, len(frame)], strict=True)]
    merged = fit([block_statistics(b, FEATURES) for b in blocks], FEATURES)
    whole = fitted(frame)
    np.testing.assert_allclose(merged.transform(frame), whole.transform(frame), atol=1e-7)
    for ours, theirs in zip(merged.columns, whole.columns, strict=True):
        assert ours.model_dump(exclude={"fill"}) == theirs.model_dump(exclude={"fill"})


def test_quantiles_replace_too_many_distinct_values(monkeypatch):
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=5000)})
    features = encodings(x={"encode": "piecewise_linear", "bins": 10})
    whole = fitted(frame, features).columns[0]
    monkeypatch.setattr(fitting, "MAX_DISTINCT_VALUES", 500)
    statistics = block_statistics(frame, features)
    assert len(statistics["x"]["values"]) <= 501
    assert sum(statistics["x"]["counts"]) == 5000
    few = fit([statistics], features).columns[0]
    assert (few.edges[0], few.edges[-1]) == (frame.x.min(), frame.x.max())
    shares = [np.searchsorted(np.sort(frame.x), column.edges) / 5000 for column in (whole, few)]
    np.testing.assert_allclose(*shares, atol=1 / 500)


def test_statistics_and_preprocessor_are_the_same_after_json():
    frame = rows(200)
    statistics = json.loads(json.dumps(block_statistics(frame, FEATURES)))
    preprocessor = fit([statistics], FEATURES)
    restored = Preprocessor.model_validate_json(preprocessor.model_dump_json())
    assert restored == preprocessor == fitted(frame)
    np.testing.assert_array_equal(restored.transform(frame), fitted(frame).transform(frame))
