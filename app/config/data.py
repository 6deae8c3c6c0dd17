"""The raw data, its contract, and how the model sees it."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.config.section import PositiveInt, Section, Width

MAX_FOLDS = 1000

RESERVED = re.compile(r"__.*__", re.DOTALL)
"""Names of columns that Raylway adds to the parts of a prepared data set."""


class Source(Section):
    """Where the rows come from: exactly one of `sample` and `path`."""

    sample: str | None = None
    """The name of a data set that set-up fetched, such as `adult`."""
    path: str | None = None
    """A Parquet or CSV file, or a folder of them; relative to where the command runs, or any URI that
    pyarrow opens. CSV is UTF-8; its separator is that of `,` `;` tab `|` by which the columns are found."""
    format: Literal["parquet", "csv"] = "parquet"
    limit: PositiveInt | None = None
    """Only the first so many rows, for trying something out."""

    @model_validator(mode="after")
    def _one(self) -> "Source":
        if (self.sample is None) == (self.path is None):
            raise ValueError("give exactly one of 'sample' and 'path'")
        return self


class Label(Section):
    """What the model predicts: a binary outcome, by exactly one of `positive` and `above`, or one of several
    `classes`."""

    column: str
    positive: str | None = None
    """The value that counts as 1; every other value of the column counts as 0."""
    above: float | None = None
    """Of a numerical column: the number beyond which a value counts as 1."""
    classes: list[str] | None = Field(None, min_length=2)
    """All the values of the column, for a model of several classes."""
    missing: Literal["refuse", "drop"] = "refuse"
    """drop: leave out the rows that have no label, such as those whose outcome is not known yet."""

    @model_validator(mode="after")
    def _one(self) -> "Label":
        if sum(given is not None for given in (self.positive, self.above, self.classes)) != 1:
            raise ValueError("give exactly one of 'positive', 'above' and 'classes'")
        if self.classes and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: each must stand once")
        for name in set(self.classes or ()) & {"label", "violation"}:
            raise ValueError(f"classes: {name!r} is a column of the answers; rename the value in the data")
        return self

    @property
    def outcome(self) -> str:
        """What counts as 1, in words: `>50K`, or `above 15`."""
        return f"above {self.above:g}" if self.positive is None else self.positive


class Number(Section):
    """A numerical column, read as float64."""

    type: Literal["number"]
    nullable: bool = False
    min: float | None = None
    """Smallest value allowed."""
    max: float | None = None
    """Largest value allowed."""


class Category(Section):
    """A column of strings."""

    type: Literal["category"]
    nullable: bool = False
    values: list[str] | None = None
    """The only values allowed, in training data and requests; any if left out."""
    unseen: Literal["refuse", "ignore"] = "refuse"
    """What a request gets whose value was never seen in training: an error that names the known ones, or
    a prediction with this column left out (its encoding is all zeros)."""


class Text(Section):
    """A column of free text."""

    type: Literal["text"]
    nullable: bool = False
    """A missing text is read as an empty one."""
    max_characters: PositiveInt = 10_000
    """Of a text in training data and requests."""


Column = Annotated[Number | Category | Text, Field(discriminator="type")]


class Split(Section):
    """Shares of the rows by part. Neither the order of rows nor the layout of files matters."""

    by: Literal["content", "time"] = "content"
    """content: a row's part is decided by a hash of `key` and `seed`, so equal rows stay together. time: the
    last rows are the test part, those before them the validation part: what a model that is to predict the
    future must be held against."""
    key: list[str] | None = Field(None, min_length=1)
    """Of `by: content`: the columns of the contract that say which rows belong together, such as a customer's
    id. If left out: the columns by which the registered champion was split, if the contract still has them;
    otherwise all columns of the contract. The label is never part of the key: rows with the same inputs
    stay together whatever their label."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of `by: content`: another seed gives other parts. Independent of the project's `seed`, so that models
    trained with different seeds are judged on the same rows."""
    column: str | None = None
    """Of `by: time`: when a row's event was; timestamps, dates, ISO 8601 text or numbers. Rows of the same
    time stay together."""
    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    fold: tuple[int, int] | None = None
    """[i, k]: the i-th of k folds, from 0, is the validation part, and the other rows but for the test part
    are trained on; `validation` has no effect. By time, fold i is a window of the length `validation`, k - i
    such windows before the test part, and what lies between is left out (Tashman, 2000)."""

    @model_validator(mode="after")
    def _possible(self) -> "Split":
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must be below 1, or nothing is left to train on")
        if self.fold is not None:
            i, k = self.fold
            if not 0 <= i < k <= MAX_FOLDS or k < 2:
                raise ValueError(
                    f"fold must be [i, k] with 0 <= i < k and k of 2 to {MAX_FOLDS}; it is {[i, k]}"
                )
            if self.by == "time" and k * self.validation + self.test >= 1:
                raise ValueError(f"{k} folds of {self.validation:g} leave nothing before the first of them")
        if (self.by == "time") != (self.column is not None):
            raise ValueError("column: by time needs the column to go by, by content takes none")
        if self.by == "time" and self.key is not None:
            raise ValueError("key: by time takes none; leave it out")
        if self.key and len(set(self.key)) < len(self.key):
            raise ValueError("key: each column must stand once")
        return self


class Interactions(Section):
    """Whose rows are interactions of users with items: what a recommender learns from."""

    user: str
    """The column of the contract, a category, that says who."""
    item: str
    """The one that says what."""
    time: str
    """When it was; timestamps, dates, ISO 8601 text or numbers, and no column of the contract. Each user's
    last interaction is the test part and the one before it the validation part (leave one out)."""
    rating: str | None = None
    """A number of the contract: how the user found the item; for explicit feedback."""


class Data(Section):
    """The raw data and the contract that it, and every request, must keep."""

    source: Source
    label: Label | None = None
    interactions: Interactions | None = None
    """What a recommender has instead of a label."""
    columns: dict[str, Column] = Field(min_length=1)
    missing: list[str] = Field([])
    """Strings that stand for a missing value, beside null and the empty string, in the data and in requests.
    One that spells a number, such as "-9", stands for that number too."""
    split: Split = Split()

    @model_validator(mode="after")
    def _one(self) -> "Data":
        if (self.label is None) == (self.interactions is None):
            raise ValueError("give exactly one of 'label' and 'interactions'")
        for name in self.split.key or []:
            if name not in self.columns:
                raise ValueError(f"split.key: no column {name!r}; data.columns has {', '.join(self.columns)}")
        for name in self.names:
            if not name or RESERVED.fullmatch(name):
                kept = "names between double underscores are Raylway's own" if name else "it is empty"
                raise ValueError(f"the column {name!r} cannot be used: {kept}; rename it in the data")
        for name, column in self.columns.items():
            for value in (isinstance(column, Category) and column.values) or ():
                if value in ("", *self.missing):
                    raise ValueError(
                        f"columns.{name}.values: {value!r} stands for a missing value; leave it out"
                    )
        return self

    @property
    def split_key(self) -> list[str]:
        """The columns that decide a row's part, where the split is by content."""
        return sorted(self.split.key or self.columns)

    @property
    def target(self) -> Label:
        """The label of data that have one."""
        assert self.label, "interactions have no label"
        return self.label

    @property
    def time(self) -> str | None:
        """The column that says when, where the split goes by it."""
        return self.interactions.time if self.interactions else self.split.column

    @property
    def names(self) -> list[str]:
        """Every column that is read."""
        beside = [self.label.column if self.label else None, self.time]
        return list(dict.fromkeys([*self.columns, *(name for name in beside if name)]))


class NumberEncoding(Section):
    """What the encodings of numbers share."""

    encode: str
    exact: PositiveInt | None = None
    """Values that occur at least so often in the training part get an indicator of their own as well. For
    numbers of which some are codes or round sums, whose meaning does not lie between their neighbours'."""


class MinMax(NumberEncoding):
    """Scale to 0..1 over the training part; beyond it is clipped; missing becomes the training mean."""

    encode: Literal["min_max"]


class Quantile(NumberEncoding):
    """The normal score of a number's quantile in the training part: outliers and skew lose their weight.
    Linear between quantiles; clipped and missing as with min_max."""

    encode: Literal["quantile"]
    bins: Width = 256
    """Between that many quantiles at most; fewer where values repeat."""


class PiecewiseLinear(NumberEncoding):
    """A share of 0..1 for each bin of training quantiles: how far the number has come through it, so that
    even a linear model bends at every edge (Gorishniy et al., 2022). Clipped and missing as with min_max."""

    encode: Literal["piecewise_linear"]
    bins: Width = 32
    """At most; fewer where values repeat."""


class OneHot(Section):
    """An indicator for each value of the training part (missing is a value if it occurred); unseen is
    all zeros."""

    encode: Literal["one_hot"]


class Embedding(Section):
    """A learnt vector for each value of the training part; unseen is the zero vector."""

    encode: Literal["embedding"]
    width: Width


class Tokens(Section):
    """The tokens of a text, by the tokenizer of the model's encoder."""

    encode: Literal["tokens"]
    max_length: int = Field(128, ge=3, le=65_536)
    """Tokens of a text, the two that mark its ends included; what is beyond is cut off."""


Encoding = Annotated[
    MinMax | Quantile | PiecewiseLinear | OneHot | Embedding | Tokens, Field(discriminator="encode")
]
