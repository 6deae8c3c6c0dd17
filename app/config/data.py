"""The sections `data` and `features`: source, label, contract, split, and encodings of the columns."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.config.section import PositiveInt, Section, Width

MAX_FOLDS = 1000

RESERVED = re.compile(r"__.*__", re.DOTALL)
"""Names of the columns that Raylway adds to prepared data."""


class Source(Section):
    """The source of the rows: exactly one of `sample` and `path`."""

    sample: str | None = None
    """Name of a data set that set-up has fetched: adult, flights, tweets or movielens."""
    path: str | None = None
    """A Parquet or CSV file, or a folder of such files: a path relative to the working directory, or a URI
    that pyarrow opens. CSV must be UTF-8; the separator is the one of `,` `;` tab `|` that yields the
    contract's columns."""
    format: Literal["parquet", "csv"] = "parquet"
    """Format of the files."""
    limit: PositiveInt | None = None
    """Number of rows to read, from the first, for a trial run. null: all."""

    @model_validator(mode="after")
    def _one(self) -> "Source":
        if (self.sample is None) == (self.path is None):
            raise ValueError("give exactly one of 'sample' and 'path'")
        return self


class Label(Section):
    """What the model predicts: a binary outcome (`positive` or `above`), or one of several `classes`. Exactly
    one of the three must be given."""

    column: str
    """Name of the column. It must not be one of `data.columns`."""
    positive: str | None = None
    """Value that counts as 1; every other value counts as 0."""
    above: float | None = None
    """Threshold of a numerical column: larger values count as 1, others as 0."""
    classes: list[str] | None = Field(None, min_length=2)
    """All values of the column, for a model of several classes."""
    missing: Literal["refuse", "drop"] = "refuse"
    """Rows without a label. refuse: the command fails. drop: they are left out, for outcomes not known
    yet."""

    @model_validator(mode="after")
    def _one(self) -> "Label":
        if sum(rule is not None for rule in (self.positive, self.above, self.classes)) != 1:
            raise ValueError("give exactly one of 'positive', 'above' and 'classes'")
        if self.classes and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: must be distinct")
        for name in set(self.classes or ()) & {"label", "violation"}:
            raise ValueError(f"classes: {name!r} is a column of the answers; rename the value in the data")
        return self

    @property
    def outcome(self) -> str:
        """Outcome that counts as 1, such as `>50K` or `above 15`."""
        return f"above {self.above:g}" if self.positive is None else self.positive


class Number(Section):
    """A numerical column, read as float64."""

    type: Literal["number"]
    nullable: bool = False
    """Whether a value may be missing."""
    min: float | None = None
    """Smallest value allowed. null: no bound."""
    max: float | None = None
    """Largest value allowed. null: no bound."""


class Category(Section):
    """A column of strings with few distinct values."""

    type: Literal["category"]
    nullable: bool = False
    """Whether a value may be missing."""
    values: list[str] | None = None
    """Values allowed in training data and requests. null: any."""
    unseen: Literal["refuse", "ignore"] = "refuse"
    """Requests with a value that was not in the training part. refuse: they get 422 with the known values.
    ignore: they are answered, with the column encoded as all zeros."""


class Text(Section):
    """A column of free text."""

    type: Literal["text"]
    nullable: bool = False
    """Whether a text may be missing; a missing text is read as an empty one."""
    max_characters: PositiveInt = 10_000
    """Maximum length of a text in characters, in training data and requests."""


Column = Annotated[Number | Category | Text, Field(discriminator="type")]


class Split(Section):
    """The split into training, validation and test part. It does not depend on the order of rows or files."""

    by: Literal["content", "time"] = "content"
    """content: a hash of `key` and `seed` decides a row's part, so equal rows stay together. time: the last
    rows are the test part and those before them the validation part, as suits a model that predicts the
    future."""
    key: list[str] | None = Field(None, min_length=1)
    """Columns of the contract that are hashed (`by: content`): rows with equal values, such as those of one
    customer, are in the same part. null: the columns by which the registered champion was split, if the
    contract still has them; else all columns of the contract. The label is never hashed."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the hash (`by: content`). It is not the project's `seed`, so that models trained with different
    seeds are evaluated on the same rows."""
    column: str | None = None
    """Column with the time of a row (`by: time`): timestamps, dates, ISO 8601 text or numbers. Rows of the
    same time stay together."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share of the rows in the validation part."""
    test: float = Field(0.2, gt=0, lt=1)
    """Share of the rows in the test part."""
    fold: tuple[int, int] | None = None
    """[i, k]: the i-th of k folds, from 0, is the validation part; the other rows outside the test part are
    the training part; `validation` has no effect. By time, fold i is a window of length `validation` that
    starts k - i such windows before the test part; the rows between it and the test part are left out
    (Tashman, 2000)."""

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
            raise ValueError("column: must be given with by: time, and left out with by: content")
        if self.by == "time" and self.key is not None:
            raise ValueError("key: must be left out with by: time")
        if self.key and len(set(self.key)) < len(self.key):
            raise ValueError("key: columns must be distinct")
        return self


class Interactions(Section):
    """Columns of a table whose rows are interactions of users with items, for a recommender."""

    user: str
    """Column of the user: a category of the contract."""
    item: str
    """Column of the item: a category of the contract."""
    time: str
    """Column of the time: timestamps, dates, ISO 8601 text or numbers; not a column of the contract. Each
    user's last interaction is the test part, and the one before it the validation part (leave one out)."""
    rating: str | None = None
    """Column of the rating: a number of the contract; required for explicit feedback."""


class Data(Section):
    """The raw data, and the contract that the data and every request must meet."""

    source: Source
    """The source of the rows."""
    label: Label | None = None
    """What the model predicts; required unless `interactions` are given."""
    interactions: Interactions | None = None
    """Columns of users, items and times: a recommender has them instead of a label."""
    columns: dict[str, Column] = Field(min_length=1)
    """The contract: columns by name, with their type and what their values must meet."""
    missing: list[str] = Field([])
    """Strings that mean a missing value, besides null and the empty string, in data and requests. A string
    that spells a number, such as "-9", covers that number too."""
    split: Split = Split()
    """The split into training, validation and test part."""

    @model_validator(mode="after")
    def _one(self) -> "Data":
        if (self.label is None) == (self.interactions is None):
            raise ValueError("give exactly one of 'label' and 'interactions'")
        for name in self.split.key or []:
            if name not in self.columns:
                raise ValueError(f"split.key: no column {name!r}; data.columns has {', '.join(self.columns)}")
        for name in self.names:
            if not name or RESERVED.fullmatch(name):
                reason = "names between double underscores are reserved" if name else "its name is empty"
                raise ValueError(f"the column {name!r} cannot be used: {reason}; rename it in the data")
        for name, column in self.columns.items():
            for value in (isinstance(column, Category) and column.values) or ():
                if value in ("", *self.missing):
                    raise ValueError(f"columns.{name}.values: {value!r} means a missing value; leave it out")
        return self

    @property
    def split_key(self) -> list[str]:
        """Columns that are hashed for a split by content."""
        return sorted(self.split.key or self.columns)

    @property
    def target(self) -> Label:
        """Label of data without interactions."""
        assert self.label, "data with interactions have no label"
        return self.label

    @property
    def time(self) -> str | None:
        """Column of the time, if the split is by time or leaves one interaction out; else None."""
        return self.interactions.time if self.interactions else self.split.column

    @property
    def names(self) -> list[str]:
        """Names of all columns that are read."""
        others = [self.label.column if self.label else None, self.time]
        return list(dict.fromkeys([*self.columns, *(name for name in others if name)]))


class NumberEncoding(Section):
    """The base class of the encodings of numbers."""

    encode: str
    exact: PositiveInt | None = None
    """Minimum number of occurrences in the training part for a value to get an indicator column too. It suits
    columns in which some numbers are codes or round sums. null: no indicators."""


class MinMax(NumberEncoding):
    """Scale to 0..1 by the range of the training part. Values outside it are clipped; a missing one is
    replaced by the mean."""

    encode: Literal["min_max"]


class Quantile(NumberEncoding):
    """Normal score of the number's quantile in the training part, which removes skew and outliers. Linear
    between quantiles; clipping and missing values as with min_max."""

    encode: Literal["quantile"]
    bins: Width = 256
    """Maximum number of quantiles; fewer if values repeat."""


class PiecewiseLinear(NumberEncoding):
    """One column per bin of training quantiles: 0 below the bin, 1 above it, linear inside (Gorishniy et al.,
    2022). Even a linear model then bends at every edge. Clipping and missing values as with min_max."""

    encode: Literal["piecewise_linear"]
    bins: Width = 32
    """Maximum number of bins; fewer if values repeat."""


class OneHot(Section):
    """One indicator column per value of the training part, and one for missing values if any occurred. An
    unseen value is all zeros."""

    encode: Literal["one_hot"]


class Embedding(Section):
    """A learnt vector per value of the training part. An unseen value is the zero vector."""

    encode: Literal["embedding"]
    width: Width
    """Length of the vector."""


class Tokens(Section):
    """Token ids of a text, by the tokenizer of the model's encoder."""

    encode: Literal["tokens"]
    max_length: int = Field(128, ge=3, le=65_536)
    """Maximum number of tokens of a text, including the two that mark its ends. Longer texts are cut off."""


Encoding = Annotated[
    MinMax | Quantile | PiecewiseLinear | OneHot | Embedding | Tokens, Field(discriminator="encode")
]
