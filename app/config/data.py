"""The raw data, its contract, and how the model sees it."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from app.config.section import Section


class Source(Section):
    """Where the rows come from: exactly one of `sample` and `path`."""

    sample: str | None = None
    """The name of a data set that set-up fetched, such as `adult`."""
    path: str | None = None
    """A Parquet or CSV file, or a folder of them; relative to where the command runs, or any URI that
    Ray Data reads."""
    format: Literal["parquet", "csv"] = "parquet"
    limit: PositiveInt | None = None
    """Only the first so many rows, for trying something out."""

    @model_validator(mode="after")
    def _one(self) -> "Source":
        if (self.sample is None) == (self.path is None):
            raise ValueError("give exactly one of 'sample' and 'path'")
        return self


class Label(Section):
    """What the model predicts: a binary outcome."""

    column: str
    positive: str
    """The value that counts as 1; every other value of the column counts as 0."""


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


Column = Annotated[Number | Category, Field(discriminator="type")]


class Split(Section):
    """Shares of the rows by part. A row's part is a hash of its content and the seed, so equal rows stay
    together and neither the order of rows nor the layout of files matters."""

    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _room_to_train(self) -> "Split":
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must be below 1, or nothing is left to train on")
        return self


class Data(Section):
    """The raw data and the contract that it, and every request, must keep."""

    source: Source
    label: Label
    columns: dict[str, Column] = Field(min_length=1)
    missing: list[str] = Field([])
    """Strings that stand for a missing value, beside null and the empty string."""
    split: Split = Split()


class MinMax(Section):
    """Scale to 0..1 over the training part; beyond it is clipped; missing becomes the training mean."""

    encode: Literal["min_max"]


class OneHot(Section):
    """An indicator for each value of the training part (missing is a value if it occurred); unseen is
    all zeros."""

    encode: Literal["one_hot"]


class Embedding(Section):
    """A learnt vector for each value of the training part; unseen is the zero vector."""

    encode: Literal["embedding"]
    width: PositiveInt


Encoding = Annotated[MinMax | OneHot | Embedding, Field(discriminator="encode")]
