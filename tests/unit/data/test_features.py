import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter
from scipy.stats import norm
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, QuantileTransformer

from app.config import Encoding
from app.data.features import Layout, Preprocessor
from app.data.fitting import block_statistics, fit

NUMBERS = ["min_max", "quantile", "piecewise_linear"]


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


def column(values, encode: str, **settings) -> tuple[Preprocessor, pd.DataFrame]:
    """A preprocessor of one column, and the frame that it was fitted on."""
    dtype = object if encode in ("one_hot", "embedding") else float
    frame = pd.DataFrame({"x": pd.Series(values, dtype=dtype)})
    return fitted(frame, encodings(x={"encode": encode, **settings})), frame


def test_numbers_are_scaled_as_by_scikit_learn():
    frame = rows(500)
    features = encodings(age={"encode": "min_max"}, pay={"encode": "min_max"})
    theirs = MinMaxScaler(clip=True).fit(frame[["age", "pay"]])
    fresh = rows(500, seed=1)[["age", "pay"]] * 3  # beyond the fitted range too
    expected = theirs.transform(fresh)
    fill = theirs.transform(frame[["age", "pay"]].mean().to_frame().T)
    expected = np.where(np.isnan(expected), fill, expected)
    ours = fitted(frame, features).transform(fresh)
    np.testing.assert_allclose(ours, expected, atol=1e-7)
    assert ours.dtype == np.float32


def test_categories_are_indicated_as_by_scikit_learn():
    frame, fresh = rows(500), rows(300, seed=1)
    fresh.loc[:9, "job"] = "astronaut"
    theirs = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    theirs.fit(frame[["job"]].fillna(""))
    ours = fitted(frame, encodings(job={"encode": "one_hot"})).transform(fresh)
    np.testing.assert_array_equal(ours, theirs.transform(fresh[["job"]].fillna("")))
    assert ours.shape == (300, 4)


@pytest.mark.parametrize("seed", range(10))
def test_the_matrix_of_random_rows_has_the_layout(seed):
    preprocessor = fitted(rows(100, seed))
    fresh = rows(200, seed + 1000)
    matrix = preprocessor.transform(fresh)
    assert matrix.shape == (200, preprocessor.layout.width)
    assert matrix.dtype == np.float32
    layout = preprocessor.layout
    dense, (index,) = matrix[:, : layout.dense], matrix[:, layout.dense :].T
    score, shares = dense[:, 2], dense[:, 3 : sum(layout.numbers)]
    assert (np.abs(score) <= 3).all()
    assert ((np.delete(dense, 2, axis=1) >= 0) & (np.delete(dense, 2, axis=1) <= 1)).all()
    assert (np.diff(shares, axis=1) <= 0).all()  # a bin is above 0 only if the previous one is 1
    one_hot = dense[:, layout.dense - 4 :]
    exact = dense[:, sum(layout.numbers) : layout.dense - 4]
    assert (one_hot.sum(axis=1) <= 1).all()
    assert (exact.sum(axis=1) <= 1).all()
    assert set(index) <= set(range(preprocessor.layout.embeddings[0][0]))


def test_numbers_come_first_then_one_hots_then_embeddings():
    preprocessor = fitted(rows(300))
    assert [c.column for c in preprocessor.columns] == ["age", "pay", "rent", "debt", "rent", "job", "town"]
    bins, exact = preprocessor.columns[3].width, preprocessor.columns[4].width
    assert (bins, exact > 0) == (4, True)  # half of the debts are 0, so two of six edges are equal
    numbers = (1, 1, 1, bins)
    assert preprocessor.layout == Layout(dense=3 + bins + exact + 4, embeddings=((21, 3),), numbers=numbers)
    assert preprocessor.layout.width == 3 + bins + exact + 4 + 1


def test_a_number_beyond_the_training_range_is_clipped():
    preprocessor, _ = column([10.0, 20.0], "min_max")
    values = np.array([-1e300, 9.0, 10.0, 15.0, 20.0, 21.0, 1e300])
    assert preprocessor.transform({"x": values})[:, 0].tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_piecewise_linear_values_by_hand():
    preprocessor, _ = column([0.0, 1.0, 2.0, 10.0], "piecewise_linear", bins=4)
    assert preprocessor.columns[0].edges == [0, 1, 2, 10]
    values = np.array([-5.0, 0.0, 0.5, 1.0, 2.0, 4.0, 99.0, np.nan])  # the mean is 3.25
    assert preprocessor.transform({"x": values}).tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0.5, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 0.25],
        [1, 1, 1],
        [1, 1, 0.15625],
    ]


def test_quantiles_have_normal_scores_as_by_scikit_learn():
    values = np.random.default_rng(0).lognormal(size=2001)
    preprocessor, frame = column(values, "quantile", bins=1000)
    theirs = QuantileTransformer(n_quantiles=1001, output_distribution="normal").fit_transform(frame[["x"]])
    inner = np.abs(theirs) < 2.5
    ours = preprocessor.transform(frame)
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=0.03)
    assert np.abs(ours).max() <= 3


def test_a_repeated_value_has_the_score_of_its_middle_quantile():
    preprocessor, _ = column([0.0] * 60 + [1.0] * 20 + [2.0] * 20, "quantile", bins=10)
    scores = preprocessor.transform({"x": np.array([0.0, 1.0, 2.0])})[:, 0]
    np.testing.assert_allclose(scores, norm.ppf([0.3, 0.7, 0.9]), atol=1e-6)


def test_frequent_values_have_indicators():
    preprocessor, _ = column([7.0, 7.0, 0.1, 0.1, 3.0, np.nan, np.nan], "min_max", exact=2)
    assert preprocessor.layout == Layout(dense=3, embeddings=(), numbers=(1,))
    values = np.array([0.1, 7.0, 3.0, 0.1 + 1e-12, np.nan])
    assert preprocessor.transform({"x": values})[:, 1:].tolist() == [[1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]


def test_a_column_may_have_no_frequent_value():
    preprocessor, frame = column([1.0, 2.0, 3.0], "min_max", exact=2)
    assert preprocessor.transform(frame).tolist() == [[0], [0.5], [1]]


def test_a_missing_number_is_the_training_mean():
    preprocessor, frame = column([0.0, 10.0, 2.0, np.nan], "min_max")
    np.testing.assert_allclose(preprocessor.transform(frame)[:, 0], [0, 1, 0.2, 0.4], atol=1e-7)


def test_a_missing_number_is_encoded_even_if_training_had_none():
    preprocessor, _ = column([0.0, 10.0, 2.0], "min_max")
    np.testing.assert_allclose(preprocessor.transform({"x": np.array([np.nan])}), [[0.4]], atol=1e-7)


@pytest.mark.parametrize("encode", NUMBERS)
def test_a_constant_number_is_0_everywhere(encode):
    preprocessor, _ = column([5.0, 5.0, np.nan], encode)
    assert preprocessor.transform({"x": np.array([5.0, 4.0, 1e9, np.nan])})[:, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [float, object])
@pytest.mark.parametrize("encode", NUMBERS)
def test_an_all_missing_number_is_0_everywhere(dtype, encode):
    frame = pd.DataFrame({"x": pd.Series([None, None], dtype=dtype)})
    preprocessor = fitted(frame, encodings(x={"encode": encode, "exact": 1}))
    assert preprocessor.transform({"x": np.array([np.nan, 3.0])})[:, 0].tolist() == [0, 0]


def test_a_large_number_keeps_its_digits():
    preprocessor, frame = column([1e9, 1e9 + 1, 1e9 + 2], "min_max")
    assert preprocessor.transform(frame)[:, 0].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("trained_on", "value", "expected"),
    [
        (["b", "a"], "a", [1, 0]),
        (["b", "a"], "b", [0, 1]),
        (["b", "a"], "c", [0, 0]),
        (["b", "a"], None, [0, 0]),
        (["b", None], None, [1, 0]),
        (["b", np.nan], None, [1, 0]),
        ([None, None], None, [1]),
        ([None, None], "a", [0]),
    ],
)
def test_one_hot_of_seen_unseen_and_missing_values(trained_on, value, expected):
    preprocessor, _ = column(trained_on, "one_hot")
    assert preprocessor.transform({"x": np.array([value], dtype=object)}).tolist() == [expected]


@pytest.mark.parametrize(
    ("trained_on", "value", "index"),
    [
        (["b", "a"], "a", 1),
        (["b", "a"], "b", 2),
        (["b", "a"], "c", 0),
        (["b", "a"], None, 0),
        (["b", None], None, 1),
        (["b", None], np.nan, 1),
        (["b", None], "b", 2),
    ],
)
def test_embedding_index_of_seen_unseen_and_missing_values(trained_on, value, index):
    preprocessor, _ = column(trained_on, "embedding", width=2)
    assert preprocessor.transform({"x": np.array([value], dtype=object)}).tolist() == [[index]]
    assert preprocessor.layout.embeddings == ((3, 2),)


@pytest.mark.parametrize("dtype", [object, "str", "string"])
def test_all_string_types_of_pandas_are_encoded_alike(dtype):
    features = encodings(x={"encode": "one_hot"})
    frame = pd.DataFrame({"x": pd.Series(["b", None, "a", "b"], dtype=dtype)})
    assert fitted(frame, features).transform(frame).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_fitted_preprocessor_is_frozen():
    preprocessor = fitted(rows(10))
    with pytest.raises(ValueError, match="frozen"):
        preprocessor.columns[0].fill = 0.0
