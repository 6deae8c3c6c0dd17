"""The section `sweep`: search space, objectives, search algorithm, scheduler and budgets."""

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
"""The sections and keys of a project that a sweep may vary: those on which a trained model depends."""
EXPORTED = ("latency_ms", "size_mb")
"""Objectives of the exported graph: its median latency for one row on one core, and its file size."""
LOWER_IS_BETTER = ("loss", "rmse", *EXPORTED)
FUNCTIONS = ("len", "min", "max", "sum", "abs")
"""The functions that a constraint may call."""
MAX_CONSTRAINT_CHARACTERS = 1000
MAX_EXACT = 2**40
"""Largest integer and largest number of steps of a range: searches compute with floats of 53 bits."""
_ALLOWED = (
    *(ast.Expression, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.List, ast.Tuple, ast.Load, ast.Call),
)


class _Parameter(Section):
    """The base class of the kinds of parameters."""

    type: str
    when: dict[str, Any] = Field({})
    """Condition: the parameter varies only if these keys have these values (a value, or a list of values).
    Each key is one of the project, or of a parameter listed before this one."""


class Float(_Parameter):
    """A float between two bounds, both included."""

    type: Literal["float"]
    low: float
    """Lower bound."""
    high: float
    """Upper bound."""
    log: bool = False
    """Whether the logarithm is sampled uniformly, as suits a learning rate."""
    step: float | None = Field(None, gt=0)
    """Distance between values, from `low` on. Values between the last step and `high` are not searched."""

    @model_validator(mode="after")
    def _possible(self) -> "Float":
        _check_bounds(self.low, self.high, self.log)
        if self.log and self.step is not None:
            raise ValueError("step: must be left out with log")
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
        """Distance of a value from the next lower step."""
        return (Decimal(repr(value)) - Decimal(repr(self.low))) % Decimal(repr(self.step))

    @property
    def num_values(self) -> int:
        """Number of values; `step` must be set."""
        return int((Decimal(repr(self.high)) - Decimal(repr(self.low))) // Decimal(repr(self.step))) + 1

    def nth(self, n: int) -> float:
        """The n-th value, from 0; `step` must be set. Computed in decimals, so that 3 steps of 0.1 are
        0.3."""
        return float(Decimal(repr(self.low)) + n * Decimal(repr(self.step)))

    @property
    def top(self) -> float:
        """The largest value."""
        return self.high if self.step is None else self.nth(self.num_values - 1)


class Int(_Parameter):
    """An integer between two bounds, both included."""

    type: Literal["int"]
    low: int = Field(ge=-MAX_EXACT, le=MAX_EXACT)
    """Lower bound."""
    high: int = Field(ge=-MAX_EXACT, le=MAX_EXACT)
    """Upper bound."""
    log: bool = False
    """Whether the logarithm is sampled uniformly, as suits a batch size."""
    step: int = Field(1, ge=1, le=MAX_EXACT)
    """Distance between values, from `low` on. Values between the last step and `high` are not searched."""

    @model_validator(mode="after")
    def _possible(self) -> "Int":
        _check_bounds(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise ValueError("step: must be left out with log")
        return self

    @property
    def num_values(self) -> int:
        """Number of values."""
        return (self.high - self.low) // self.step + 1

    def nth(self, n: int) -> int:
        """The n-th value, from 0."""
        return self.low + n * self.step

    @property
    def top(self) -> int:
        """The largest value."""
        return self.nth(self.num_values - 1)


class Choice(_Parameter):
    """One of the listed values, which may be lists or mappings, such as the layers of a network."""

    type: Literal["choice"]
    values: list[Any] = Field(min_length=1)
    """The values to choose from: text, numbers, booleans, null, lists or mappings of these."""

    @model_validator(mode="after")
    def _distinct(self) -> "Choice":
        encoded_values: list[Any] = []
        for value in self.values:
            try:
                encoded = encode(value)
            except (TypeError, ValueError):
                raise ValueError(
                    "values: must be text, finite numbers, booleans, null, or lists and mappings of these; "
                    f"one is {value!r}"
                ) from None
            if encoded in encoded_values:
                raise ValueError(f"values: must be distinct; {value!r} is listed twice")
            encoded_values.append(encoded)
        return self


def encode(value: Any) -> Any:
    """A value as a study stores it: lists and mappings as JSON. Raises TypeError or ValueError if the value
    has no JSON."""
    text = json.dumps(value, allow_nan=False)
    return text if isinstance(value, list | dict) else value


Parameter = Annotated[Float | Int | Choice, Field(discriminator="type")]


class Asha(Section):
    """Asynchronous successive halving (Li et al., 2020): at each rung, a trial continues if it is among the
    best 1 / reduction_factor of the trials that reached the rung. Each rung has reduction_factor times the
    epochs of the one before."""

    kind: Literal["asha"]
    grace_epochs: PositiveInt = 1
    """Number of epochs at the first rung."""
    reduction_factor: float = Field(3, gt=1)
    """Inverse of the share of trials that continue at a rung."""


class Median(Section):
    """Median rule (Golovin et al., 2017): stop a trial whose best value is below the median of the other
    trials' running means at the same epoch."""

    kind: Literal["median"]
    grace_epochs: PositiveInt = 1
    """Number of epochs before a trial may be stopped."""
    min_trials: PositiveInt = 3
    """Minimum number of other trials to compare with."""


class Hyperband(Section):
    """Asynchronous Hyperband (Li et al., 2018): successive halving in several brackets, whose first rungs
    differ."""

    kind: Literal["hyperband"]
    grace_epochs: PositiveInt = 1
    """Number of epochs at the first rung of the first bracket."""
    reduction_factor: float = Field(3, gt=1)
    """Inverse of the share of trials that continue at a rung."""
    brackets: PositiveInt = 3
    """Number of brackets."""


class PopulationBased(Section):
    """Population based training (Jaderberg et al., 2017): the worst quarter of the trials continues from the
    checkpoints of the best, with slightly changed settings. All trials train at once or take turns."""

    kind: Literal["pbt"]
    every_epochs: PositiveInt = 1
    """Number of epochs between changes."""


class NoScheduler(Section):
    """No trial is stopped early."""

    kind: Literal["none"]


Scheduler = Annotated[Asha | Median | Hyperband | PopulationBased | NoScheduler, Field(discriminator="kind")]


def _require_study_name(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            "must have at most 100 letters, digits, dots, dashes and underscores, and begin with a letter or "
            f"digit; it is {shown(name)}"
        )
    return name


class Sweep(Section):
    """A search for better settings, run by `raylway sweep`."""

    study: Annotated[str, AfterValidator(_require_study_name)] | None = None
    """Name under which the trials are stored. null: the project's name."""
    space: dict[str, Parameter] = Field(min_length=1)
    """Parameters by the dotted key of the project that they set, such as training.learning_rate."""
    set: dict[str, Any] = Field({})
    """Values of keys that all trials have instead of the project's: `training.num_workers: 1` lets several
    trials train at once. The best project has them too."""
    constraints: list[str] = Field([])
    """Conditions that a trial's project must meet, such as `training.batch_size * training.num_workers <=
    1024`. A condition on a key that the project lacks is met."""
    objectives: list[str] = Field([])
    """Metrics to improve: validation metrics, `latency_ms` (one row on one core) and `size_mb` (the exported
    graph). Several give a Pareto front. []: the validation metric by which the best epoch is chosen."""
    search: Literal["tpe", "gp", "cmaes", "nsga2", "random", "grid"] = "tpe"
    """Search algorithm of Optuna. tpe: Parzen estimators, for any space. gp: a Gaussian process, for few
    expensive trials. cmaes: an evolution strategy, for many numbers and many trials. nsga2: a genetic
    algorithm for several objectives. grid: every point once."""
    startup_trials: PositiveInt = 10
    """Number of random trials before the search uses the results of earlier ones."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """Seed of the search. null: the project's seed. Does not change the split of the rows or the initial
    weights."""
    scheduler: Scheduler | None = None
    """Rule that stops trials early. null: asha, or none with several objectives."""
    trials: PositiveInt = 20
    """Number of trials in all, including those that were stopped early and those that failed."""
    folds: int | None = Field(None, ge=2, le=MAX_FOLDS)
    """Number of folds: a trial trains and validates each in turn, and its value is the mean. null: no
    folds."""
    points: list[dict[str, Any]] = Field([])
    """Points to try first: values by key, of all parameters or some."""
    warm_start: list[str] = Field([])
    """Names of earlier studies of the same space and objectives, whose trials the search learns from."""
    concurrent: PositiveInt | None = None
    """Maximum number of trials at once. null: as many as the cluster has room for."""
    retries: NonNegativeInt = 1
    """Number of times that a failed trial is repeated before it is stored as failed."""
    max_hours: PositiveFloat | None = None
    """Maximum duration of one run of the command, in hours. null: no limit."""
    max_core_hours: PositiveFloat | None = None
    """Maximum compute time of all trials of the study together, in core-hours. null: no limit."""
    target: float | None = None
    """Value of the single objective at which the sweep ends. null: no target."""

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
                    raise ValueError(f"{name}: {key!r} cannot vary; must be a key of {', '.join(SWEPT)}")
        for key, parameter in self.space.items():
            earlier = list(self.space)[: list(self.space).index(key)]
            for other in parameter.when:
                if other in self.space and other not in earlier:
                    raise ValueError(f"space.{key}.when: {other!r} must be listed before it in the space")
        for i, point in enumerate(self.points):
            for key in point:
                if key not in self.space:
                    raise ValueError(f"points.{i}: {key!r} must be a key of sweep.space")
        for name in self.objectives:
            if self.objectives.count(name) > 1:
                raise ValueError(f"objectives: must be distinct; {name!r} is listed twice")
        if len(self.objectives) > 1:
            self._check_several_objectives()
        if self.search == "grid":
            for key, parameter in self.space.items():
                if isinstance(parameter, Float) and parameter.step is None:
                    raise ValueError(f"search: grid needs space.{key}.step, or a choice of values")
        if isinstance(self.scheduler, PopulationBased):
            self._check_population()
        return self

    def _check_several_objectives(self) -> None:
        if self.scheduler is not None and self.scheduler.kind != "none":
            raise ValueError(f"scheduler: {self.scheduler.kind} needs a single objective; leave it out")
        if self.search == "cmaes":
            raise ValueError("search: must be nsga2, tpe or gp with several objectives; it is cmaes")
        if self.target is not None:
            raise ValueError("target: needs a single objective; leave it out")

    def _check_population(self) -> None:
        if self.folds:
            raise ValueError("folds: must be left out with scheduler pbt, which continues from checkpoints")
        allowed = {"training.learning_rate", "training.weight_decay", "training.clip_norm", "model.dropout"}
        for key, parameter in self.space.items():
            if key not in allowed or parameter.when:
                raise ValueError(
                    f"space.{key}: scheduler pbt changes parameters during training, so each must be one of "
                    f"{', '.join(sorted(allowed))}, without `when`"
                )

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """Direction in which each objective improves."""
        return ["minimize" if name in LOWER_IS_BETTER else "maximize" for name in self.objectives]

    @property
    def effective_scheduler(self) -> Any:
        """Scheduler in effect: `scheduler`, or its default."""
        if self.scheduler is not None:
            return self.scheduler
        return NoScheduler(kind="none") if len(self.objectives) > 1 else Asha(kind="asha")


def _check_bounds(low: float, high: float, log: bool) -> None:
    if low > high:
        raise ValueError(f"low must not be above high; they are {low:g} and {high:g}")
    if log and low <= 0:
        raise ValueError(f"low must be above 0 with log; it is {low:g}")


def _check_expression(text: str) -> None:
    """Raise ValueError unless a constraint is a comparison of arithmetic expressions of keys."""
    if len(text) > MAX_CONSTRAINT_CHARACTERS:
        raise ValueError(f"must have at most {MAX_CONSTRAINT_CHARACTERS} characters; it has {len(text)}")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r}: must be an expression: {getattr(error, 'msg', error)}") from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise ValueError(f"{text!r}: must compare keys and numbers; {type(node).__name__} is not allowed")
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            raise ValueError(f"{text!r}: must not call functions other than {', '.join(FUNCTIONS)}")
    if not isinstance(tree.body, ast.Compare | ast.BoolOp | ast.UnaryOp):
        raise ValueError(f"{text!r}: must be a comparison, such as training.batch_size <= 512")
