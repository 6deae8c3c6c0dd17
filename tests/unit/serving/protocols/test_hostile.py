"""Small requests that cost much: by memory, which does not depend on the machine, instead of time."""

import tracemalloc

import pytest

from app.serving.http import MAX_LISTED_VIOLATIONS, Refused
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Contract
from app.serving.replica import feedback
from tests.bundles import schema

SIZE = 300_000
"""Bytes of a body."""
KEYS = ",".join(f'"{number:x}":0' for number in range(SIZE // 8))
AGE = '"name":"age","datatype":"FP64","data":[1]'


def filled(item, head, tail):
    """A body of about SIZE bytes in which an item is repeated."""
    return f"{head}{','.join([item] * (SIZE // (len(item) + 1)))}{tail}"


PREDICTIONS = {
    "unknown columns": f'{{"rows":[{{{KEYS}}}]}}',
    "unknown members": f"{{{KEYS}}}",
    "empty rows": filled("{}", '{"rows":[', "]}"),
    "rows that are numbers": filled("1", '{"rows":[', "]}"),
    "brackets": "[" * SIZE,
    "nested rows": '{"rows":' + "[" * SIZE,
    "a long integer": f'{{"rows":[{{"age":{"9" * SIZE}}}]}}',
    "a long fraction": f'{{"rows":[{{"age":0.{"9" * SIZE}}}]}}',
}
INFERENCES = {
    "empty inputs": filled("{}", '{"inputs":[', "]}"),
    "inputs that are numbers": filled("1", '{"inputs":[', "]}"),
    "a shape of numbers": filled("1", f'{{"inputs":[{{{AGE},"shape":[', "]}]}"),
    "a shape of texts": filled('""', f'{{"inputs":[{{{AGE},"shape":[', "]}]}"),
    "outputs": filled('{"name":""}', f'{{"inputs":[{{{AGE},"shape":[1]}}],"outputs":[', "]}"),
    "empty outputs": filled("{}", f'{{"inputs":[{{{AGE},"shape":[1]}}],"outputs":[', "]}"),
    "data": filled("[]", '{"inputs":[{"name":"age","datatype":"FP64","shape":[1],"data":[', "]}]}"),
    "unknown members": f"{{{KEYS}}}",
    "parameters": f'{{"inputs":[],"parameters":{{{KEYS}}}}}',
}
FEEDBACKS = {
    "unknown members": f"{{{KEYS}}}",
    "outcomes": filled("{}", '{"request_id":"r","outcomes":[', "]}"),
}


def check(parse, text):
    """It is refused, and takes memory in proportion to its size."""
    body = text.encode()
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as refused:
            parse(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.status in (400, 413, 422)
    assert len(refused.value.violations) <= MAX_LISTED_VIOLATIONS
    assert len(refused.value.body()) < 100_000
    assert peak < 100 * SIZE


@pytest.mark.parametrize("text", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_rows(text):
    contract = Contract(schema(), max_rows=1024)
    check(lambda body: rows.parse(body, contract), text)


@pytest.mark.parametrize("text", INFERENCES.values(), ids=INFERENCES.keys())
def test_tensors(text):
    contract = Contract(schema(), max_rows=1024)
    check(lambda body: tensors.parse(body, None, contract), text)


@pytest.mark.parametrize("text", FEEDBACKS.values(), ids=FEEDBACKS.keys())
def test_feedback(text):
    check(lambda body: feedback.parse(body, schema()), text)
