"""What a project file may say: one YAML file that describes a model's whole life."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """A part of the project file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


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
    missing: list[str] = []
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


class Linear(Section):
    """Logistic regression."""

    kind: Literal["linear"]


class Mlp(Section):
    """A multi-layer perceptron with ReLU."""

    kind: Literal["mlp"]
    hidden: list[PositiveInt] = Field(min_length=1)
    """Units of each hidden layer."""
    dropout: float = Field(0.0, ge=0, lt=1)


Model = Annotated[Linear | Mlp, Field(discriminator="kind")]


class Training(Section):
    """How the model is fitted: Adam with decoupled weight decay on the log loss, one cosine down to 0."""

    num_workers: PositiveInt
    """Horovod ranks, one process each."""
    epochs: PositiveInt
    batch_size: PositiveInt
    """Rows per step and worker."""
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each worker when the cluster has them, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp16 with loss scaling on older ones, fp32 on the CPU."""
    max_failures: int = Field(3, ge=0)
    """How many times a lost worker group is started again from its last checkpoint."""


METRICS = ("auc", "accuracy", "precision", "recall", "f1")
"""The metrics that a gate may name, each better when higher."""

Metric = Literal["auc", "accuracy", "precision", "recall", "f1"]
Baseline = Literal["constant", "logistic_regression", "gradient_boosting"]


class Gate(Section):
    """What a candidate must show on the test part to be registered."""

    metric: Metric = "auc"
    """What is compared with the champion and the baselines."""
    minimum: dict[Metric, float] = {}
    beat: list[Baseline] = ["constant"]
    """Baselines that the candidate's metric must exceed."""
    tolerance: float = Field(0.0, ge=0)
    """How far below the champion's metric the candidate may be."""


class Variant(Section):
    """A registered version that answers a share of the traffic."""

    version: str
    """An alias such as `champion`, or a version number."""
    weight: float = Field(gt=0)
    """Share of the units, relative to the other variants' weights."""


class Autoscaling(Section):
    """How many replicas answer, by Ray Serve's autoscaler."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: float = Field(8, gt=0)
    """Requests in progress per replica that the autoscaler aims at."""
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(60, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Autoscaling":
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class Serving(Section):
    """The endpoint under /v2/models/<name>, on the loopback interface."""

    port: int = Field(8000, ge=1, le=65535)
    salt: str = "1"
    """Changes which units fall to which variant; change it to begin a new experiment."""
    variants: dict[str, Variant] = Field(min_length=1)
    autoscaling: Autoscaling = Autoscaling()
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that a replica reserves on the cluster."""
    max_body_bytes: PositiveInt = 1_048_576
    max_rows: PositiveInt = 1024
    """Rows in one request."""


class Project(Section):
    """A project file, whole."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")
    """The registered model's name and the endpoint's: small letters, digits and dashes."""
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data
    features: dict[str, Encoding] = Field(min_length=1)
    """The columns that the model sees, and how. A column of the contract that is not named here is
    checked, but no input of the model."""
    model: Model
    training: Training
    gate: Gate = Gate()
    serving: Serving

    @model_validator(mode="after")
    def _consistent(self) -> "Project":
        if self.data.label.column in self.data.columns:
            raise ValueError(f"data.label.column: {self.data.label.column!r} must not be one of data.columns")
        for name, encoding in self.features.items():
            if name == "probability":
                raise ValueError(f"features.{name}: the model's output has this name; rename the column")
            column = self.data.columns.get(name)
            if column is None:
                raise ValueError(
                    f"features.{name}: no such column; data.columns has {', '.join(self.data.columns)}"
                )
            if (column.type == "number") != (encoding.encode == "min_max"):
                fits = "min_max" if column.type == "number" else "one_hot or embedding"
                raise ValueError(f"features.{name}: a {column.type} takes {fits}, not {encoding.encode}")
        return self
