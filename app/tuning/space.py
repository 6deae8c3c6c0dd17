"""A search space: its points, and the project that each point makes."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from pydantic import ValidationError

from app.config import Parameter, Project, Sweep, faults
from app.config.sweep import encode
from app.errors import UserError
from app.tuning import parameters
from app.tuning.constraints import MissingKey, holds, look_up

Point = Mapping[str, Any]
"""Encoded values by key, for the parameters whose `when` holds."""
MAX_COUNTED_POINTS = 100_000
"""Largest size of a space that is counted exactly."""
NUM_CHECKED_POINTS = 300
"""Largest size of a space whose points `Space.check` tests all; number of random points in a larger one."""


class Space:
    """The search space of a project's section `sweep`.

    `base` is the project with the settings that all trials share. `sweep` is the section, with objectives.
    """

    def __init__(self, project: Project):
        """Raises UserError if the project has no sweep, or `sweep.set` makes no valid project."""
        if project.sweep is None:
            raise UserError(
                "sweep: is missing; add the keys to vary, such as sweep: {space: {training.learning_rate: "
                "{type: float, low: 0.0001, high: 0.1, log: true}}}"
            )
        objectives = project.sweep.objectives or [project.model.score]
        self.sweep: Sweep = project.sweep.model_copy(update={"objectives": objectives})
        # Without defaults, so that a parameter can replace a whole branch and leave nothing of the old one.
        self._document = project.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
        for key, value in self.sweep.set.items():
            _set(self._document, key, value)
        try:
            self.base = Project.model_validate(self._document)
        except ValidationError as error:
            raise UserError(f"sweep.set: makes no valid project: {_first_fault(error)}") from None

    def suggest(self, trial: Any) -> Point:
        """Have an Optuna trial choose a point; sets the trial's parameters."""
        return self._walk(lambda key, parameter: parameters.suggest(trial, key, parameter))[0]

    def document(self, point: Point) -> dict[str, Any]:
        """The project file that a point makes, as JSON values, without `sweep`."""
        return self._walk(lambda key, parameter: point.get(key, _UNCHANGED))[1]

    def project(self, point: Point) -> Project:
        """The project that a point makes. Raises ValidationError if it is not valid."""
        return Project.model_validate(self.document(point))

    def admits(self, point: Point) -> bool:
        """Whether a point meets the constraints.

        Raises ValidationError if its project is not valid, TypeError if a constraint cannot be evaluated.
        """
        project = self.project(point)
        return all(holds(constraint, project) for constraint in self.sweep.constraints)

    def encode(self, values: Mapping[str, Any]) -> Point:
        """The point for values as they stand in the project file."""
        return {key: encode(value) for key, value in values.items()}

    def decode(self, point: Point) -> dict[str, Any]:
        """The values of a point as they stand in the project file."""
        return {key: parameters.decode(self.sweep.space[key], value) for key, value in point.items()}

    def points(self) -> Iterator[Point]:
        """All points of a space without continuous parameters, including those that break a constraint."""
        return self._points({}, list(self.sweep.space))

    def size(self) -> int | None:
        """Number of points, at most MAX_COUNTED_POINTS + 1; None if a parameter is continuous."""
        space = self.sweep.space
        if any(parameters.is_continuous(parameter) for parameter in space.values()):
            return None
        # Enumerate the values of the parameters that a `when` depends on only; for the others, multiply the
        # numbers of values.
        conditions = {key for parameter in space.values() for key in parameter.when}
        condition_keys = [key for key in space if any(_overlap(key, condition) for condition in conditions)]
        size = 0
        for point in self._points({}, condition_keys):
            document = self.document(point)
            size += math.prod(
                parameters.num_values(parameter)
                for key, parameter in space.items()
                if key not in condition_keys and self._applies(parameter, document)
            )
            if size > MAX_COUNTED_POINTS:
                return MAX_COUNTED_POINTS + 1
        return size

    def contains(self, point: Point) -> bool:
        """Whether the space has each key of a point, and each parameter has the point's value."""
        return all(
            key in self.sweep.space and parameters.contains(self.sweep.space[key], value)
            for key, value in point.items()
        )

    def distributions(self, point: Point) -> dict[str, optuna.distributions.BaseDistribution]:
        """Optuna's distribution of each key of a point."""
        return {key: parameters.distribution(self.sweep.space[key]) for key in point}

    def describe(self) -> list[str]:
        """The space in lines for the user, with its size in the last one."""
        lines = [f"{key}: {parameters.describe(parameter)}" for key, parameter in self.sweep.space.items()]
        lines += [f"where {constraint}" for constraint in self.sweep.constraints]
        size = self.size()
        if size is None:
            num_continuous = sum(parameters.is_continuous(p) for p in self.sweep.space.values())
            plural = "s" if num_continuous > 1 else ""
            count = f"{len(self.sweep.space)} parameters" if len(self.sweep.space) > 1 else "1 parameter"
            return [*lines, f"size: unbounded, {count}, {num_continuous} continuous range{plural}"]
        more = "more than " if size > MAX_COUNTED_POINTS else ""
        return [*lines, f"size: {more}{min(size, MAX_COUNTED_POINTS):,} points"]

    def check(self) -> None:
        """Raise UserError if no point meets the constraints, or a point makes no valid project.

        Tests all points of a small space; of a larger one, each bound and choice, and random points.
        """
        size = self.size()
        if size is not None and size <= NUM_CHECKED_POINTS:
            points = list(self.points())
        else:
            points = [*self._edges(), *self._random_points()]
        admits_any = False
        for point in points:
            try:
                admits_any |= self.admits(point)
            except ValidationError as error:
                raise UserError(
                    f"sweep.space: {self.decode(point)} makes no valid project: {_first_fault(error)}; "
                    "change the space, or exclude the point with `when` or choice values"
                ) from None
            except TypeError as error:
                raise UserError(f"sweep.constraints: {error}") from None
        if not admits_any:
            raise UserError(
                f"sweep.constraints: none of {len(points)} points meets "
                f"{' and '.join(self.sweep.constraints)}; the constraints contradict the space, or each other"
            )
        for i, values in enumerate(self.sweep.points):
            self._check_point(i, values)

    def _check_point(self, i: int, values: Mapping[str, Any]) -> None:
        """Raise UserError unless the search can try the point `i` of `sweep.points`.

        The search chooses the parameters that `values` leaves out, so some choice of them must be valid.
        """
        for key, value in values.items():
            parameter = self.sweep.space[key]
            if not parameters.contains(parameter, value):
                description = parameters.describe(parameter)
                raise UserError(f"sweep.points.{i}.{key}: must be {description}; it is {value!r}")
        point = self.encode(values)
        fault = "breaks a `when`"
        for completed in self._completed(point):
            if not point.items() <= completed.items():
                continue
            try:
                if self.admits(completed):
                    return
                fault = "breaks a constraint"
            except ValidationError as error:
                fault = f"makes no valid project: {_first_fault(error)}"
        raise UserError(f"sweep.points.{i}: {dict(values)} {fault}, whatever the other parameters are")

    def _completed(self, point: Point) -> Iterator[Point]:
        """NUM_CHECKED_POINTS copies of a point, with random values for the parameters that it leaves out.

        Only one copy if it leaves out none.
        """
        study = _random_study()
        for _ in range(1 if set(point) == set(self.sweep.space) else NUM_CHECKED_POINTS):
            study.enqueue_trial(dict(point))
            yield self.suggest(study.ask())

    def _walk(self, choose: Callable[[str, Parameter], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Set each parameter whose `when` holds, in order, to the value that `choose` returns.

        Returns the point and the document of its project.
        """
        document, point = copy.deepcopy(self._document), {}
        for key, parameter in self.sweep.space.items():
            if self._applies(parameter, document) and (value := choose(key, parameter)) is not _UNCHANGED:
                point[key] = value
                _set(document, key, parameters.decode(parameter, value))
        return point, document

    def _applies(self, parameter: Parameter, document: Mapping[str, Any]) -> bool:
        """Whether a parameter's `when` holds."""
        for key, required in parameter.when.items():
            allowed = required if isinstance(required, list) else [required]
            try:
                value = look_up(document, key.split("."))
            except MissingKey:
                try:
                    value = look_up(self.base, key.split("."))  # a default, which the document leaves out
                except MissingKey:
                    return False
            if value not in allowed:
                return False
        return True

    def _points(self, chosen: dict[str, Any], keys: Sequence[str]) -> Iterator[Point]:
        """All points that have the values chosen so far and any of the remaining keys."""
        document = self.document(chosen)
        for i, key in enumerate(keys):
            if self._applies(parameter := self.sweep.space[key], document):
                for value in parameters.values(parameter):
                    yield from self._points({**chosen, key: value}, keys[i + 1 :])
                return
        yield chosen

    def _edges(self) -> Iterator[Point]:
        """Points that together have each bound and each choice."""
        edges = {key: parameters.bounds(parameter) for key, parameter in self.sweep.space.items()}
        for key, values in edges.items():
            for value in values:
                for other in (0, -1):  # the other parameters at their first values, and at their last
                    yield self._walk(lambda k, _: value if k == key else edges[k][other])[0]  # noqa: B023

    def _random_points(self) -> Iterator[Point]:
        study = _random_study()
        for _ in range(NUM_CHECKED_POINTS):
            yield self.suggest(study.ask())


_UNCHANGED = object()
"""Return value of `choose` for a parameter that keeps the project's own value."""


def _random_study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def _overlap(key: str, other: str) -> bool:
    """Whether one of two keys is the other, or a section that contains it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _set(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. Raises UserError if a part of the key has a value that is not a mapping."""
    *parents, last = key.split(".")
    section: Any = document
    for i, part in enumerate(parents):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"sweep.space.{key}: {'.'.join(parents[: i + 1])} is a value, so it has no keys")
    section[last] = copy.deepcopy(value)


def _first_fault(error: ValidationError) -> str:
    """The key and the message of the first fault."""
    fault = error.errors()[0]
    key = ".".join(faults.resolve(Project, fault["loc"])[0])
    message = faults.describe(fault)
    return f"{key}: {message}" if key else message
