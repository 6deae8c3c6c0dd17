"""An unexpected error is logged with its traceback. The tests read the source files of `app`."""

import ast
from collections.abc import Iterator

import pytest

from tests.unit.test_imports import NAMES, tree

LEVELS = {"debug", "info", "warning", "error", "critical"}


def handlers(node: ast.AST) -> Iterator[ast.ExceptHandler]:
    """The handlers in a node that catch every error."""
    for child in ast.walk(node):
        if isinstance(child, ast.ExceptHandler):
            kind = ast.unparse(child.type) if child.type else "BaseException"
            if kind in ("Exception", "BaseException"):
                yield child


def logs(handler: ast.ExceptHandler) -> Iterator[tuple[int, bool]]:
    """The line of each call of a logger in a handler, and whether it logs the traceback."""
    for node in ast.walk(handler):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        logger, method = ast.unparse(node.func.value), node.func.attr
        if logger != "log" and "getLogger" not in logger:
            continue
        if method == "exception":
            yield node.lineno, True
        elif method in LEVELS:
            yield node.lineno, any(keyword.arg == "exc_info" for keyword in node.keywords)


def faults(module: ast.Module) -> Iterator[str]:
    """Lines that log an unexpected error without its traceback, and loops that hide one."""
    for handler in handlers(module):
        for line, has_traceback in logs(handler):
            if not has_traceback:
                yield f"line {line}: log the traceback too (log.exception, or exc_info)"
    for loop in (node for node in ast.walk(module) if isinstance(node, ast.While)):
        for handler in handlers(loop):
            leaves = any(isinstance(node, ast.Raise | ast.Return | ast.Break) for node in ast.walk(handler))
            if not leaves and not list(logs(handler)):
                yield f"line {handler.lineno}: the loop continues after an error without logging it"


@pytest.mark.parametrize("module", NAMES)
def test_an_unexpected_error_is_logged_with_its_traceback(module):
    assert list(faults(tree(module))) == []


@pytest.mark.parametrize(
    ("body", "is_fault"),
    [
        ("log.exception('failed')", False),
        ("log.warning('failed', exc_info=True)", False),
        ("raise", False),
        ("log.error('failed: %s', error)", True),
        ("logging.getLogger(__name__).warning('failed')", True),
        ("count += 1", True),
    ],
)
def test_a_loop_that_hides_an_error_is_found(body, is_fault):
    loop = f"while True:\n    try:\n        work()\n    except Exception as error:\n        {body}\n"
    assert bool(list(faults(ast.parse(loop)))) == is_fault
