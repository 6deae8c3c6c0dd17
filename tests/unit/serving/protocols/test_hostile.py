"""Memory that malformed requests cost: unlike time, it does not depend on the machine."""

import tracemalloc

import pytest

from app.serving.http import MAX_LISTED_VIOLATIONS, Refused
from app.serving.protocols import rows, tensors
from app.serving.protocols.contract import Contract
from app.serving.replica import feedback
from tests.bundles import schema

SIZE_BYTES = 300_000
"""Size of a request body in bytes."""
KEYS = ",".join(f'"{number:x}":0' for number in range(SIZE_BYTES // 8))
AGE = '"name":"age","datatype":"FP64","data":[1]'


def filled(item, head, tail):
    """A body of about SIZE_BYTES that repeats an item between `head` and `tail`."""
    return f"{head}{','.join([item] * (SIZE_BYTES // (len(item) + 1)))}{tail}"


PREDICTIONS = {
    "unknown columns": f'{{"rows":[{{{KEYS}}}]}}',
    "unknown members": f"{{{KEYS}}}",
    "empty rows": filled("{}", '{"rows":[', "]}"),
    "rows that are numbers": filled("1", '{"rows":[', "]}"),
    "brackets": "[" * SIZE_BYTES,
    "nested rows": '{"rows":' + "[" * SIZE_BYTES,
    "a long integer": f'{{"rows":[{{"age":{"9" * SIZE_BYTES}}}]}}',
    "a long fraction": f'{{"rows":[{{"age":0.{"9" * SIZE_BYTES}}}]}}',
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


def assert_cheap_refusal(parse, text):
    """A body is refused, with memory in proportion to its size and a short answer."""
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
    assert peak < 100 * SIZE_BYTES


@pytest.mark.parametrize("text", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_rows_are_refused_with_bounded_memory(text):
    contract = Contract(schema(), max_rows=1024)
    assert_cheap_refusal(lambda body: rows.parse(body, contract), text)


@pytest.mark.parametrize("text", INFERENCES.values(), ids=INFERENCES.keys())
def test_tensors_are_refused_with_bounded_memory(text):
    contract = Contract(schema(), max_rows=1024)
    assert_cheap_refusal(lambda body: tensors.parse(body, None, contract), text)


@pytest.mark.parametrize("text", FEEDBACKS.values(), ids=FEEDBACKS.keys())
def test_feedback_is_refused_with_bounded_memory(text):
    assert_cheap_refusal(lambda body: feedback.parse(body, schema()), text)
