"""The project file: one YAML file that describes a model's whole life, typed and checked."""

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from app.errors import UserError


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
            column = self.data.columns.get(name)
            if column is None:
                raise ValueError(f"features.{name}: no such column; data.columns has {_listed(self.data.columns)}")
            if (column.type == "number") != (encoding.encode == "min_max"):
                fits = "min_max" if column.type == "number" else "one_hot or embedding"
                raise ValueError(f"features.{name}: a {column.type} takes {fits}, not {encoding.encode}")
        return self


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Project:
    """Read a project file.

    `overrides` are strings `a.b=c` whose value is YAML; they replace or add a key.

    Raises UserError, naming every fault with its path, the line of the file, and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such project file; the shipped ones are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: must be a mapping with the keys {_listed(Project.model_fields)}; it is empty or a list")
    lines = _lines(node, path)
    overridden = [_override(document, text) for text in overrides]
    try:
        return Project.model_validate(document)
    except ValidationError as error:
        faults = [_fault(path, lines, overridden, e) for e in error.errors()]
        raise UserError("\n".join(faults)) from None


def _lines(node: yaml.Node, file: Path) -> dict[tuple[str, ...], int]:
    """The line of each key, by its path. Raises UserError at a key that stands twice."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, str(key.value))
                line = key.start_mark.line + 1
                if here in lines:
                    raise UserError(f"{file}:{line}: {'.'.join(here)}: stands twice (first in line {lines[here]}); keep one")
                lines[here] = line
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines[*at, str(i)] = item.start_mark.line + 1
                walk(item, (*at, str(i)))

    walk(node, ())
    return lines


def _override(document: dict[str, Any], text: str) -> tuple[str, ...]:
    """Apply one `a.b=c` to the document; returns its path."""
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise UserError(f"--set {text}: must be of the form key.key=value, such as training.epochs=3")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML: {error}") from None
    place: Any = document
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {text}: {part!r} is a value, so it has no keys")
    place[path[-1]] = parsed
    return path


def _fault(path: Path, lines: dict[tuple[str, ...], int], overridden: list[tuple[str, ...]], error: Any) -> str:
    """One line for one fault: where, which key, what is wrong, what is allowed."""
    loc, allowed = _resolve(Project, tuple(str(part) for part in error["loc"]))
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 1)
    where = "--set" if any(loc[: len(o)] == o for o in overridden) else f"{path}:{line}"
    match error["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(loc[-1], allowed, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            message = f"unknown key{meant}; allowed: {_listed(allowed)}"
        case "missing":
            message = f"is missing; the keys here are {_listed(allowed)}"
        case "union_tag_not_found":
            message = f"{error['ctx']['discriminator']} is missing"
        case "value_error":
            message = str(error["ctx"]["error"])
            named = {".".join(key): line for key, line in lines.items()}  # a check of the whole names its key
            line = named.get(message.partition(":")[0], 1) if not loc else line
            where = where if where == "--set" else f"{path}:{line}"
        case _:
            message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
            if not isinstance(error["input"], dict | list):
                message += f"; it is {error['input']!r}"
    return f"{where}: {'.'.join(loc)}: {message}" if loc else f"{where}: {message}"


def _resolve(annotation: Any, loc: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Pydantic's location without its union tags, and the keys allowed where its last part stands."""
    clean: list[str] = []
    allowed: list[str] = []
    for part in loc:
        while typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        args = typing.get_args(annotation)
        if typing.get_origin(annotation) in (types.UnionType, typing.Union):
            tagged = [a for a in args if part in _tags(a)]
            if tagged:
                annotation = tagged[0]
                continue
        clean.append(part)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            allowed = list(annotation.model_fields)
            field = annotation.model_fields.get(part)
            annotation = field.annotation if field else None
        elif args:
            annotation = args[-1]
            allowed = []
    return tuple(clean), allowed


def _tags(annotation: Any) -> tuple[str, ...]:
    """The literals by which a section of a discriminated union is chosen."""
    if not (isinstance(annotation, type) and issubclass(annotation, Section)):
        return ()
    field = next(iter(annotation.model_fields.values()))
    return typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()


def _listed(names: typing.Iterable[str]) -> str:
    return ", ".join(sorted(names))
