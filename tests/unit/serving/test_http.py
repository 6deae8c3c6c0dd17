import time
import uuid

from app.serving.http import new_request_id


def test_request_ids_are_in_the_order_of_time_and_never_the_same(monkeypatch):
    given = []
    for ns in range(0, 10**9, 10**6):
        monkeypatch.setattr(time, "time_ns", lambda ns=ns: 1_790_000_000 * 10**9 + ns)
        given.append(new_request_id())
    assert given == sorted(given)
    monkeypatch.undo()
    assert len({new_request_id() for _ in range(10_000)}) == 10_000
    made = uuid.UUID(new_request_id())
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert abs((made.int >> 80) / 1000 - time.time()) < 60
