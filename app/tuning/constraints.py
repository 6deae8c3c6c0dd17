"""Constraints of a search space: expressions over a project's keys, which can only compute and compare."""

import ast
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from app.config import Project

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"len": len, "min": min, "max": max, "sum": sum, "abs": abs}


class MissingKey(Exception):
    """The project has no such key."""


def holds(constraint: str, project: Project) -> bool:
    """Whether a project meets a constraint.

    A constraint on a key that the project does not have is met, and so is one that divides by zero. Raises
    TypeError if the constraint cannot be evaluated.
    """
    try:
        return bool(_evaluate(ast.parse(constraint, mode="eval").body, project))
    except (MissingKey, ZeroDivisionError):
        return True
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{constraint!r} cannot be evaluated: {error}") from None


def look_up(value: Any, path: Sequence[str | int]) -> Any:
    """The value at a path of keys, attributes and list indices. Raises MissingKey if there is none."""
    for part in path:
        try:
            if isinstance(part, str) and not isinstance(value, dict):
                value = getattr(value, part)
            else:
                value = value[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            raise MissingKey from None
    return value


def _evaluate(node: ast.AST, project: Project) -> Any:
    """The value of an expression. `app.config.sweep` has refused all other kinds of nodes."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_evaluate(element, project) for element in node.elts]
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return look_up(project, _path(node))
        case ast.Call(func=ast.Name(id=name)):
            return _FUNCTIONS[name](*(_evaluate(argument, project) for argument in node.args))
        case ast.UnaryOp():
            return _OPERATORS[type(node.op)](_evaluate(node.operand, project))
        case ast.BinOp():
            operands = [_evaluate(operand, project) for operand in (node.left, node.right)]
            if not all(isinstance(operand, int | float) for operand in operands):  # "a" * 10**10 takes 10 GB
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
    raise TypeError(f"{type(node).__name__} is not allowed in a constraint")


def _path(node: ast.AST) -> list[str | int]:
    match node:
        case ast.Name():
            return [node.id]
        case ast.Attribute():
            return [*_path(node.value), node.attr]
        case ast.Subscript(slice=ast.Constant(value=str() | int() as part)):
            return [*_path(node.value), part]
    raise TypeError(f"{ast.unparse(node)!r} is not a key")
