import asyncio
import json
import time
import uuid

import pytest

from app.serving.gateway.body import ReceivedBody
from app.serving.http import MAX_LISTED_VIOLATIONS, Refused, Request, Response, new_request_id


def request(method="POST", headers=None):
    return Request(method, "/", headers or {}, ReceivedBody(b""), "r-1")


def sent(response, method):
    messages = []

    async def send(message):
        messages.append(message)

    asyncio.run(response.send(send, "r-1", method))
    return messages


def test_request_ids_are_unique_and_sort_by_time(monkeypatch):
    ids = []
    for ns in range(0, 10**9, 10**6):
        monkeypatch.setattr(time, "time_ns", lambda ns=ns: 1_790_000_000 * 10**9 + ns)
        ids.append(new_request_id())
    assert ids == sorted(ids)
    monkeypatch.undo()
    assert len({new_request_id() for _ in range(10_000)}) == 10_000
    parsed = uuid.UUID(new_request_id())
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert abs((parsed.int >> 80) / 1000 - time.time()) < 60


@pytest.mark.parametrize(("method", "allowed"), [("GET", "GET, HEAD"), ("POST", "POST")])
def test_405_names_the_allowed_methods(method, allowed):
    with pytest.raises(Refused, match=f"the method must be {method}.*, not PUT") as refused:
        request("PUT").require_method(method)
    assert (refused.value.status, refused.value.headers) == (405, {"allow": allowed})


def test_head_is_allowed_where_get_is():
    request("HEAD").require_method("GET")
    with pytest.raises(Refused):
        request("HEAD").require_method("POST")


def test_header_values_are_latin_1():
    headers = {b"x-name": b"caf\xe9"}
    assert request(headers=headers).header(b"x-name") == "café"
    assert request(headers=headers).header(b"x-other", "default") == "default"


@pytest.mark.parametrize(("method", "body"), [("GET", b"12345"), ("HEAD", b"")])
def test_a_response_declares_its_length_also_for_head(method, body):
    start, content = sent(Response(b"12345", 201, {"retry-after": "1"}), method)
    assert start["status"] == 201
    assert dict(start["headers"]) == {
        b"content-length": b"5", b"content-type": b"application/json",
        b"x-request-id": b"r-1", b"retry-after": b"1",
    }  # fmt: skip
    assert content["body"] == body


def test_a_refusal_lists_a_bounded_number_of_violations():
    violations = [{"path": str(number), "message": "is unknown"} for number in range(1_000)]
    response = Response.from_refusal(Refused(422, "wrong", violations, {"allow": "GET"}))
    document = json.loads(response.body)
    assert (response.status, response.headers, document["error"]) == (422, {"allow": "GET"}, "wrong")
    assert document["violations"] == violations[:MAX_LISTED_VIOLATIONS]
