"""A search for better settings: what may vary, how it is searched, and when it ends."""

import ast
import json
import math
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from app.config.data import MAX_FOLDS
from app.config.faults import shown
from app.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

SWEPT = ("data", "features", "model", "training", "seed")
"""The keys of a project, or what stands below them, that can vary: those on which a trained model depends."""
EXPORTED = ("latency_ms", "size_mb")
"""Objectives of the served graph: the median time of one row on one core, and the size of the file."""
LOWER_IS_BETTER = ("loss", "rmse", *EXPORTED)
FUNCTIONS = ("len", "min", "max", "sum", "abs")
"""What a constraint may call."""
MAX_CONSTRAINT_CHARACTERS = 1000
MAX_EXACT = 2**40
"""Largest integer of a range, and most steps: searches compute with floats, and need digits to spare."""
_ALLOWED = (
    *(ast.Expression, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.List, ast.Tuple, ast.Load, ast.Call),
)


class _Parameter(Section):
    """What all kinds of parameters share."""

    type: str
    when: dict[str, Any] = Field({})
    """Only where other keys have these values: a value, or a list of them. Keys of the project, or of
    parameters that stand before this one."""


class Float(_Parameter):
    """A number between two bounds, both included."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    """Uniform in its logarithm: for what is felt in factors, such as a learning rate."""
    step: float | None = Field(None, gt=0)
    """From `low` in such steps; what is left below `high` is not searched."""

    @model_validator(mode="after")
    def _possible(self) -> "Float":
        _check_bounds(self.low, self.high, self.log)
        if self.log and self.step is not None:
            raise ValueError("step: log takes none")
        if not math.isfinite(self.high - self.low):
            raise ValueError(f"low and high are too far apart: {self.low:g} and {self.high:g}")
        if self.step is not None:
            if (self.high - self.low) / self.step >= MAX_EXACT:
                raise ValueError(
                    f"step: {self.step:g} is too small for a range from {self.low:g} to {self.high:g}"
                )
            if self.nth(self.num_values - 1) > self.high or self._rest(self.top):
                raise ValueError(f"step: {self.step!r} from {self.low!r} has too many digits; round both")
        return self

    def _rest(self, value: float) -> Decimal:
        """How far a value is from a step."""
        return (Decimal(repr(value)) - Decimal(repr(self.low))) % Decimal(repr(self.step))

    @property
    def num_values(self) -> int:
        """How many values there are, with a step."""
        return int((Decimal(repr(self.high)) - Decimal(repr(self.low))) // Decimal(repr(self.step))) + 1

    def nth(self, n: int) -> float:
        """The n-th value from 0, with a step; in decimals, so that 3 steps of 0.1 are 0.3."""
        return float(Decimal(repr(self.low)) + n * Decimal(repr(self.step)))

    @property
    def top(self) -> float:
        """The largest value."""
        return self.high if self.step is None else self.nth(self.num_values - 1)


class Int(_Parameter):
    """A whole number between two bounds, both included."""

    type: Literal["int"]
    low: int = Field(ge=-MAX_EXACT, le=MAX_EXACT)
    high: int = Field(ge=-MAX_EXACT, le=MAX_EXACT)
    log: bool = False
    step: int = Field(1, ge=1, le=MAX_EXACT)
    """From `low` in such steps; what is left below `high` is not searched."""

    @model_validator(mode="after")
    def _possible(self) -> "Int":
        _check_bounds(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise ValueError("step: log takes none")
        return self

    @property
    def num_values(self) -> int:
        """How many values there are."""
        return (self.high - self.low) // self.step + 1

    def nth(self, n: int) -> int:
        """The n-th value, from 0."""
        return self.low + n * self.step

    @property
    def top(self) -> int:
        """The largest value."""
        return self.nth(self.num_values - 1)


class Choice(_Parameter):
    """One of some values; lists and mappings too, such as the layers of a network."""

    type: Literal["choice"]
    values: list[Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> "Choice":
        known: list[Any] = []
        for value in self.values:
            try:
                stored = encode(value)
            except (TypeError, ValueError):
                raise ValueError(
                    "values: must be text, finite numbers, booleans, null, or lists and mappings of these; "
                    f"one is {value!r}"
                ) from None
            if stored in known:
                raise ValueError(f"values: {value!r} stands twice")
            known.append(stored)
        return self


def encode(value: Any) -> Any:
    """A value as a study stores it: a list or a mapping as its JSON. Raises TypeError or ValueError for what
    has none."""
    text = json.dumps(value, allow_nan=False)
    return text if isinstance(value, list | dict) else value


Parameter = Annotated[Float | Int | Choice, Field(discriminator="type")]


class Asha(Section):
    """Asynchronous successive halving (Li et al., 2020): at a rung a trial goes on if it is among the best
    1 / reduction_factor of those that have come so far; the next rung is reduction_factor times as far."""

    kind: Literal["asha"]
    grace_epochs: PositiveInt = 1
    """Before the first rung."""
    reduction_factor: float = Field(3, gt=1)


class Median(Section):
    """Stop a trial that is worse than the median of the others' means at its epoch (Golovin et al., 2017)."""

    kind: Literal["median"]
    grace_epochs: PositiveInt = 1
    min_trials: PositiveInt = 3
    """Others that a trial is held against."""


class Hyperband(Section):
    """Asynchronous Hyperband: successive halving in several brackets, which begin to stop at other epochs."""

    kind: Literal["hyperband"]
    grace_epochs: PositiveInt = 1
    reduction_factor: float = Field(3, gt=1)
    brackets: PositiveInt = 3


class PopulationBased(Section):
    """Population based training (Jaderberg et al., 2017): the worst quarter goes on from the checkpoints of
    the best, with settings that are changed a little. All trials train at once or take turns."""

    kind: Literal["pbt"]
    every_epochs: PositiveInt = 1


class NoScheduler(Section):
    """Every trial is trained to its end."""

    kind: Literal["none"]


Scheduler = Annotated[Asha | Median | Hyperband | PopulationBased | NoScheduler, Field(discriminator="kind")]


def _study(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            "must have at most 100 letters, digits, dots, dashes and underscores, and begin with a letter or "
            f"digit; it is {shown(name)}"
        )
    return name


class Sweep(Section):
    """A search for better settings; `raylway sweep` runs it."""

    study: Annotated[str, AfterValidator(_study)] | None = None
    """The name under which the trials are stored; the project's if left out."""
    space: dict[str, Parameter] = Field(min_length=1)
    """What may vary, by the dotted key of the project that it sets."""
    set: dict[str, Any] = Field({})
    """Keys that all trials have other than the project: `training.num_workers: 1` lets several train at once.
    The best project has them too."""
    constraints: list[str] = Field([])
    """Conditions on the project that a point makes, such as
    `training.batch_size * training.num_workers <= 1024`. One that names what a point has not holds."""
    objectives: list[str] = Field([])
    """What is to be better: validation metrics, `latency_ms` and `size_mb`; several are weighed against each
    other (Pareto). If left out, the score by which the best epoch is chosen."""
    search: Literal["tpe", "gp", "cmaes", "nsga2", "random", "grid"] = "tpe"
    """tpe: Parzen estimators, for any space. gp: a Gaussian process, for few dear trials. cmaes: evolution,
    for many numbers and many trials. nsga2: evolution for several objectives. grid: every point once."""
    startup_trials: PositiveInt = 10
    """Random ones before the search begins to learn."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """Of what is drawn; the project's if left out. Rows and first weights go by the project's alone."""
    scheduler: Scheduler | None = None
    """When a trial is given up; if left out, asha, and none with several objectives."""
    trials: PositiveInt = 20
    """How many in all, with those that were stopped early and those that failed."""
    folds: int | None = Field(None, ge=2, le=MAX_FOLDS)
    """What a trial optimises is then the mean over so many folds, each trained and validated in turn."""
    points: list[dict[str, Any]] = Field([])
    """Tried first: values by key, of all parameters or of some."""
    warm_start: list[str] = Field([])
    """Earlier studies of the same space and objectives, from which the search learns before it begins."""
    concurrent: PositiveInt | None = None
    """Trials at once; as many as the cluster has room for if left out."""
    retries: NonNegativeInt = 1
    """How many times a trial that failed is tried again before it is stored as failed."""
    max_hours: PositiveFloat | None = None
    """Of wall time, for each call of the command."""
    max_core_hours: PositiveFloat | None = None
    """Of all trials of the study together."""
    target: float | None = None
    """The sweep ends when a trial is as good; of one objective."""

    @field_validator("constraints")
    @classmethod
    def _safe(cls, constraints: list[str]) -> list[str]:
        for text in constraints:
            _check_expression(text)
        return constraints

    @model_validator(mode="after")
    def _consistent(self) -> "Sweep":
        for name, keys in (("space", self.space), ("set", self.set)):
            for key in keys:
                if key.split(".")[0] not in SWEPT or key.startswith("data.split.fold"):
                    raise ValueError(f"{name}: {key!r} cannot vary; keys below {', '.join(SWEPT)} can")
        for key, parameter in self.space.items():
            before = list(self.space)[: list(self.space).index(key)]
            for other in parameter.when:
                if other in self.space and other not in before:
                    raise ValueError(f"space.{key}.when: {other!r} must stand before it in the space")
        for i, point in enumerate(self.points):
            for key in point:
                if key not in self.space:
                    raise ValueError(f"points.{i}: {key!r} is no key of the space")
        for name in self.objectives:
            if self.objectives.count(name) > 1:
                raise ValueError(f"objectives: {name!r} stands twice")
        if len(self.objectives) > 1:
            self._check_several()
        if self.search == "grid":
            for key, parameter in self.space.items():
                if isinstance(parameter, Float) and parameter.step is None:
                    raise ValueError(f"search: a grid needs space.{key}.step, or a choice of values")
        if isinstance(self.scheduler, PopulationBased):
            self._check_population()
        return self

    def _check_several(self) -> None:
        if self.scheduler is not None and self.scheduler.kind != "none":
            raise ValueError(f"scheduler: {self.scheduler.kind} goes by one objective; leave it out")
        if self.search == "cmaes":
            raise ValueError("search: cmaes takes one objective; say nsga2, tpe or gp")
        if self.target is not None:
            raise ValueError("target: of several objectives there is none; leave it out")

    def _check_population(self) -> None:
        if self.folds:
            raise ValueError(
                "folds: population based training goes on from checkpoints, which folds have not"
            )
        allowed = {"training.learning_rate", "training.weight_decay", "training.clip_norm", "model.dropout"}
        for key, parameter in self.space.items():
            if key not in allowed or parameter.when:
                raise ValueError(
                    f"space.{key}: population based training changes it while a network trains; only "
                    f"{', '.join(sorted(allowed))} can, without `when`"
                )

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """Which way each objective is better."""
        return ["minimize" if name in LOWER_IS_BETTER else "maximize" for name in self.objectives]

    @property
    def pruned_by(self) -> Any:
        """The scheduler in effect."""
        if self.scheduler is not None:
            return self.scheduler
        return NoScheduler(kind="none") if len(self.objectives) > 1 else Asha(kind="asha")


def _check_bounds(low: float, high: float, log: bool) -> None:
    if low > high:
        raise ValueError(f"low must not be above high; they are {low:g} and {high:g}")
    if log and low <= 0:
        raise ValueError(f"low must be above 0 with log; it is {low:g}")


def _check_expression(text: str) -> None:
    """Raise ValueError if a constraint is anything but arithmetic and comparisons of keys."""
    if len(text) > MAX_CONSTRAINT_CHARACTERS:
        raise ValueError(f"must have at most {MAX_CONSTRAINT_CHARACTERS} characters; it has {len(text)}")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is no expression: {getattr(error, 'msg', error)}") from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise ValueError(
                f"{text!r}: {type(node).__name__} is not for constraints; compare keys and numbers"
            )
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            raise ValueError(f"{text!r}: may call {', '.join(FUNCTIONS)} alone")
    if not isinstance(tree.body, ast.Compare | ast.BoolOp | ast.UnaryOp):
        raise ValueError(f"{text!r}: must be a comparison, such as training.batch_size <= 512")
