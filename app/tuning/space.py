"""The points of a search space, and the project that each of them makes."""

import ast
import copy
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from pydantic import ValidationError

from app.config import Choice, Float, Int, Parameter, Project, Sweep, faults
from app.config.sweep import encode
from app.errors import UserError

Point = Mapping[str, Any]
"""Values by key, of those parameters whose `when` holds; a list or a mapping as its JSON, as Optuna stores
neither."""
MANY = 100_000
NUM_DRAWN = 300
"""Points that are looked at to find out whether a space makes sense."""
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"len": len, "min": min, "max": max, "sum": sum, "abs": abs}


class Space:
    """What a project's `sweep` may vary.

    `base` is the project with what all trials share; `sweep` names its objectives.
    """

    def __init__(self, project: Project):
        if project.sweep is None:
            raise UserError(
                "sweep: is missing; it says what to vary, such as sweep: {space: {training.learning_rate: "
                "{type: float, low: 0.0001, high: 0.1, log: true}}}"
            )
        named = project.sweep.objectives or [project.model.score]
        self.sweep: Sweep = project.sweep.model_copy(update={"objectives": named})
        # What was not said is left out, so that a parameter can replace a branch without leftovers of it.
        self._document = project.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
        for key, value in self.sweep.set.items():
            _set(self._document, key, value)
        try:
            self.base = Project.model_validate(self._document)
        except ValidationError as error:
            raise UserError(f"sweep.set: makes no valid project: {_fault(error)}") from None

    def suggest(self, trial: Any) -> Point:
        """A point by an Optuna trial, whose parameters are then set."""
        return self._walk(lambda key, parameter: _suggest(trial, key, parameter))[0]

    def document(self, point: Point) -> dict[str, Any]:
        """The project file that a point makes, as JSON values; without `sweep`."""
        return self._walk(lambda key, parameter: point.get(key, _SKIP))[1]

    def project(self, point: Point) -> Project:
        """The project that a point makes. Raises ValidationError if it makes none."""
        return Project.model_validate(self.document(point))

    def admits(self, point: Point) -> bool:
        """Whether a point meets the constraints."""
        project = self.project(point)
        return all(_holds(constraint, project) for constraint in self.sweep.constraints)

    def encoded(self, values: Mapping[str, Any]) -> Point:
        """Values as a person writes them, as those of a point."""
        return {key: encode(value) for key, value in values.items()}

    def decoded(self, point: Point) -> dict[str, Any]:
        """Values of a point as a person writes them."""
        return {key: _decode(self.sweep.space[key], value) for key, value in point.items()}

    def points(self) -> Iterator[Point]:
        """All points, if there are no continuous parameters; those that break a constraint too."""
        return self._points({}, list(self.sweep.space))

    def size(self) -> int | None:
        """How many points there are, at most MANY + 1; None if a parameter is continuous."""
        space = self.sweep.space
        if any(_continuous(parameter) for parameter in space.values()):
            return None
        # Only parameters on which a `when` depends need to be gone through value by value.
        conditions = {key for parameter in space.values() for key in parameter.when}
        deciding = [key for key in space if any(_overlap(key, condition) for condition in conditions)]
        size = 0
        for point in self._points({}, deciding):
            document = self.document(point)
            size += math.prod(
                _count(parameter)
                for key, parameter in space.items()
                if key not in deciding and self._applies(parameter, document)
            )
            if size > MANY:
                return MANY + 1
        return size

    def contains(self, point: Point) -> bool:
        """Whether each value is one of its parameter's."""
        return all(
            key in self.sweep.space and _contains(self.sweep.space[key], value)
            for key, value in point.items()
        )

    def distributions(self, point: Point) -> dict[str, optuna.distributions.BaseDistribution]:
        """Optuna's name of what each value of a point was chosen from."""
        return {key: _distribution(self.sweep.space[key]) for key in point}

    def described(self) -> list[str]:
        """The space in lines for a person, its size last."""
        lines = [f"{key}: {_described(parameter)}" for key, parameter in self.sweep.space.items()]
        lines += [f"where {constraint}" for constraint in self.sweep.constraints]
        size = self.size()
        if size is None:
            continuous = sum(_continuous(p) for p in self.sweep.space.values())
            plural = "s" if continuous > 1 else ""
            of = f"{len(self.sweep.space)} parameters" if len(self.sweep.space) > 1 else "1 parameter"
            return [*lines, f"size: unbounded, {of}, {continuous} continuous range{plural}"]
        return [*lines, f"size: {'more than ' if size > MANY else ''}{min(size, MANY):,} points"]

    def check(self) -> None:
        """Raise UserError for a space that is contradictory, or has a point that makes no valid project.

        Looks at each bound and choice, and at points drawn at random; at all points if they are few.
        """
        size = self.size()
        if size is not None and size <= NUM_DRAWN:
            points = list(self.points())
        else:
            points = [*self._edges(), *self._drawn()]
        admitted = False
        for point in points:
            try:
                admitted |= self.admits(point)
            except ValidationError as error:
                raise UserError(
                    f"sweep.space: {self.decoded(point)} makes no valid project: {_fault(error)}; mend the "
                    "space, or leave the point out with `when` or choice values"
                ) from None
            except TypeError as error:
                raise UserError(f"sweep.constraints: {error}") from None
        if not admitted:
            raise UserError(
                f"sweep.constraints: none of {len(points)} points meets "
                f"{' and '.join(self.sweep.constraints)}; the constraints contradict the space, or each other"
            )
        for i, values in enumerate(self.sweep.points):
            self._check_point(i, values)

    def _check_point(self, i: int, values: Mapping[str, Any]) -> None:
        """Raise UserError unless the search can try a point, with random values for what it leaves out."""
        for key, value in values.items():
            parameter = self.sweep.space[key]
            if not _contains(parameter, value):
                raise UserError(f"sweep.points.{i}.{key}: must be {_described(parameter)}; it is {value!r}")
        point = self.encoded(values)
        fault = "breaks a `when`"
        for completed in self._completed(point):
            if not point.items() <= completed.items():
                continue
            try:
                if self.admits(completed):
                    return
                fault = "breaks a constraint"
            except ValidationError as error:
                fault = f"makes no valid project: {_fault(error)}"
        raise UserError(f"sweep.points.{i}: {dict(values)} {fault}, whatever the other parameters are")

    def _completed(self, point: Point) -> Iterator[Point]:
        """A point with random values for what it leaves out, NUM_DRAWN times; once if that is nothing."""
        study = _random_study()
        for _ in range(1 if set(point) == set(self.sweep.space) else NUM_DRAWN):
            study.enqueue_trial(dict(point))
            yield self.suggest(study.ask())

    def _walk(self, choose: Callable[[str, Parameter], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Go through the parameters that apply, in order: their values, and the document with them set."""
        document, point = copy.deepcopy(self._document), {}
        for key, parameter in self.sweep.space.items():
            if self._applies(parameter, document) and (value := choose(key, parameter)) is not _SKIP:
                point[key] = value
                _set(document, key, _decode(parameter, value))
        return point, document

    def _applies(self, parameter: Parameter, document: Mapping[str, Any]) -> bool:
        for key, wanted in parameter.when.items():
            allowed = wanted if isinstance(wanted, list) else [wanted]
            try:
                value = _look(document, key.split("."))
            except _Absent:
                try:
                    value = _look(self.base, key.split("."))  # it may have a default
                except _Absent:
                    return False
            if value not in allowed:
                return False
        return True

    def _points(self, chosen: dict[str, Any], keys: Sequence[str]) -> Iterator[Point]:
        document = self.document(chosen)
        for i, key in enumerate(keys):
            if self._applies(parameter := self.sweep.space[key], document):
                for value in _values(parameter):
                    yield from self._points({**chosen, key: value}, keys[i + 1 :])
                return
        yield chosen

    def _edges(self) -> Iterator[Point]:
        """Points that between them have each bound and each choice."""
        edges = {key: _bounds(parameter) for key, parameter in self.sweep.space.items()}
        for key, values in edges.items():
            for value in values:
                for other in (0, -1):  # the others at their low ends, and at their high ones
                    yield self._walk(lambda k, _: value if k == key else edges[k][other])[0]  # noqa: B023

    def _drawn(self) -> Iterator[Point]:
        study = _random_study()
        for _ in range(NUM_DRAWN):
            yield self.suggest(study.ask())


def _random_study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


_SKIP = object()
"""Chosen for a parameter that is to stay as the project has it."""


def _suggest(trial: Any, key: str, parameter: Parameter) -> Any:
    match parameter:
        case Float():
            return trial.suggest_float(
                key, parameter.low, parameter.top, log=parameter.log, step=parameter.step
            )
        case Int():
            return trial.suggest_int(
                key, parameter.low, parameter.top, log=parameter.log, step=parameter.step
            )
        case Choice():
            return trial.suggest_categorical(key, [encode(value) for value in parameter.values])


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    match parameter:
        case Float():
            return optuna.distributions.FloatDistribution(
                parameter.low, parameter.top, log=parameter.log, step=parameter.step
            )
        case Int():
            return optuna.distributions.IntDistribution(
                parameter.low, parameter.top, log=parameter.log, step=parameter.step
            )
        case Choice():
            return optuna.distributions.CategoricalDistribution([encode(v) for v in parameter.values])


def _contains(parameter: Parameter, value: Any) -> bool:
    """Whether a value is one of the parameter's, as Optuna sees it."""
    try:
        value = encode(value)
    except (TypeError, ValueError):
        return False
    if isinstance(parameter, Choice):
        return any(v == value and isinstance(v, bool) == isinstance(value, bool)
                   for v in map(encode, parameter.values))  # fmt: skip
    if isinstance(value, bool) or not isinstance(value, int if isinstance(parameter, Int) else int | float):
        return False
    try:
        optuna.trial.create_trial(params={"": value}, distributions={"": _distribution(parameter)}, value=0.0)
    except (ValueError, OverflowError):
        return False
    return True


def _values(parameter: Parameter) -> Iterator[Any]:
    """All values, encoded."""
    if isinstance(parameter, Choice):
        return map(encode, parameter.values)
    return map(parameter.nth, range(parameter.num_values))


def _overlap(key: str, other: str) -> bool:
    """Whether setting one of two keys can change the value of the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _count(parameter: Parameter) -> int:
    return len(parameter.values) if isinstance(parameter, Choice) else parameter.num_values


def _bounds(parameter: Parameter) -> list[Any]:
    if isinstance(parameter, Choice):
        return [encode(value) for value in parameter.values]
    return [parameter.low, parameter.top]


def _continuous(parameter: Parameter) -> bool:
    return isinstance(parameter, Float) and parameter.step is None


def _described(parameter: Parameter) -> str:
    if isinstance(parameter, Choice):
        what = f"one of {', '.join(json.dumps(value) for value in parameter.values)}"
    else:
        step = f" in steps of {parameter.step:g}" if parameter.step not in (None, 1) else ""
        scale = ", logarithmic" if parameter.log else ""
        what = f"{parameter.type} from {parameter.low:g} to {parameter.high:g}{step}{scale}"
    when = " and ".join(f"{key} is {json.dumps(value)}" for key, value in parameter.when.items())
    return f"{what}, when {when}" if when else what


def _decode(parameter: Parameter, value: Any) -> Any:
    if isinstance(parameter, Choice):
        return next((v for v in parameter.values if encode(v) == value), value)
    return value


def _set(document: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place: Any = document
    for i, part in enumerate(parents):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"sweep.space.{key}: {'.'.join(parents[: i + 1])} is a value, so it has no keys")
    place[last] = copy.deepcopy(value)


def _fault(error: ValidationError) -> str:
    """The first fault in words."""
    fault = error.errors()[0]
    at = ".".join(faults.resolve(Project, fault["loc"])[0])
    message = faults.explained(fault)
    return f"{at}: {message}" if at else message


class _Absent(Exception):
    """A key that is not there."""


def _look(place: Any, path: Sequence[str | int]) -> Any:
    """The value at a path of keys, attributes and places in lists."""
    for part in path:
        try:
            if isinstance(part, str) and not isinstance(place, dict):
                place = getattr(place, part)
            else:
                place = place[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            raise _Absent from None
    return place


def _holds(constraint: str, project: Project) -> bool:
    """Whether a project meets a constraint; one that names what the project has not is met."""
    try:
        return bool(_evaluate(ast.parse(constraint, mode="eval").body, project))
    except (_Absent, ZeroDivisionError):
        return True
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{constraint!r} cannot be evaluated: {error}") from None


def _evaluate(node: ast.AST, project: Project) -> Any:
    """Arithmetic and comparisons; which of them are allowed was checked when the project was read."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_evaluate(element, project) for element in node.elts]
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return _look(project, _path(node))
        case ast.Call(func=ast.Name(id=name)):
            return _FUNCTIONS[name](*(_evaluate(argument, project) for argument in node.args))
        case ast.UnaryOp():
            return _OPERATORS[type(node.op)](_evaluate(node.operand, project))
        case ast.BinOp():
            operands = [_evaluate(operand, project) for operand in (node.left, node.right)]
            if not all(isinstance(operand, int | float) for operand in operands):
                raise TypeError(
                    f"{ast.unparse(node)!r} needs numbers, and has {operands[0]!r} and {operands[1]!r}"
                )
            return _OPERATORS[type(node.op)](*operands)
        case ast.BoolOp():
            parts = (_evaluate(value, project) for value in node.values)
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        case ast.Compare():
            values = [_evaluate(value, project) for value in (node.left, *node.comparators)]
            pairs = zip(node.ops, itertools.pairwise(values), strict=True)
            return all(_OPERATORS[type(op)](a, b) for op, (a, b) in pairs)
    raise TypeError(f"{type(node).__name__} is not for constraints")


def _path(node: ast.AST) -> list[str | int]:
    match node:
        case ast.Name():
            return [node.id]
        case ast.Attribute():
            return [*_path(node.value), node.attr]
        case ast.Subscript(slice=ast.Constant(value=str() | int() as part)):
            return [*_path(node.value), part]
    raise TypeError(f"{ast.unparse(node)!r} is no key")
