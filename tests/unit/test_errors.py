import pickle

import pytest
from ray.exceptions import RayTaskError

from app.errors import UserError, describe, describe_traceback, first_cause, unwrap_user_errors

TRACE = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:income:endpoint.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "app/serving/replica/endpoint.py", line 1, in __init__
    raise UserError("x")
app.errors.UserError: the variants differ in
  column age

Advice from Ray: see https://docs.ray.io
"""


def wrapped() -> Exception:
    """A UserError as Ray raises it after it was raised in a task."""
    error = RayTaskError(
        "read",
        "Traceback ...\napp.errors.UserError: row 7: is ragged\nTo retry, set max_retries",
        UserError("row 7: is ragged"),
    )
    return pickle.loads(pickle.dumps(error)).as_instanceof_cause()


def test_the_first_cause_of_an_error_is_the_exception_that_was_raised_first():
    assert str(first_cause(wrapped())) == "row 7: is ragged"
    inner = ValueError("no\nmore")
    outer = RuntimeError("outer")
    outer.__cause__ = inner
    assert first_cause(outer) is inner
    assert describe(outer) == "ValueError: no"
    assert describe(KeyError()) == "KeyError: no message"


def test_a_user_error_from_a_worker_is_raised_without_its_wrappers():
    with pytest.raises(UserError) as caught, unwrap_user_errors():
        raise wrapped() from RuntimeError("Ray Data's own")
    assert type(caught.value) is UserError
    assert str(caught.value) == "row 7: is ragged"
    with pytest.raises(ValueError, match="ours"), unwrap_user_errors():
        raise ValueError("ours")


def test_a_traceback_is_described_by_its_last_exception_not_its_last_line():
    assert describe_traceback(TRACE) == "the variants differ in\n  column age"
    other = TRACE.replace("app.errors.UserError: the variants differ in\n  column age", "ValueError: bad")
    assert describe_traceback(other) == "ValueError: bad"
    assert describe_traceback("no traceback at all") == "no traceback at all"
    assert describe_traceback("") == "no message"
