"""One parameter of a search space: its values, and their form in Optuna.

Optuna cannot store lists and mappings, so they are encoded as JSON text.
"""

import json
from collections.abc import Iterator
from typing import Any

import optuna

from app.config import Choice, Float, Int, Parameter
from app.config.sweep import encode


def suggest(trial: optuna.Trial, key: str, parameter: Parameter) -> Any:
    """Have an Optuna trial choose a value; returns it encoded."""
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


def distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    """The parameter's values as a distribution of Optuna."""
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


def contains(parameter: Parameter, value: Any) -> bool:
    """Whether the parameter has a value, encoded or not. True is not 1, and 8.0 is not the integer 8."""
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
        optuna.trial.create_trial(params={"": value}, distributions={"": distribution(parameter)}, value=0.0)
    except (ValueError, OverflowError):
        return False
    return True


def values(parameter: Parameter) -> Iterator[Any]:
    """All values of a parameter that is not continuous, encoded."""
    if isinstance(parameter, Choice):
        return map(encode, parameter.values)
    return map(parameter.nth, range(parameter.num_values))


def num_values(parameter: Parameter) -> int:
    """Number of values of a parameter that is not continuous."""
    return len(parameter.values) if isinstance(parameter, Choice) else parameter.num_values


def bounds(parameter: Parameter) -> list[Any]:
    """The lowest and the highest value, or all choices; encoded."""
    if isinstance(parameter, Choice):
        return [encode(value) for value in parameter.values]
    return [parameter.low, parameter.top]


def is_continuous(parameter: Parameter) -> bool:
    """Whether the parameter is a float without steps, whose values cannot be listed."""
    return isinstance(parameter, Float) and parameter.step is None


def decode(parameter: Parameter, value: Any) -> Any:
    """The value in the project file for an encoded value."""
    if isinstance(parameter, Choice):
        return next((v for v in parameter.values if encode(v) == value), value)
    return value


def describe(parameter: Parameter) -> str:
    """The parameter's values and condition, for the user."""
    if isinstance(parameter, Choice):
        text = f"one of {', '.join(json.dumps(value) for value in parameter.values)}"
    else:
        step = f" in steps of {parameter.step:g}" if parameter.step not in (None, 1) else ""
        scale = ", logarithmic" if parameter.log else ""
        text = f"{parameter.type} from {parameter.low:g} to {parameter.high:g}{step}{scale}"
    condition = " and ".join(f"{key} is {json.dumps(value)}" for key, value in parameter.when.items())
    return f"{text}, when {condition}" if condition else text
