import pytest
from sqlalchemy.exc import OperationalError

from app.serving.replica import prediction_writer
from app.serving.replica.prediction_writer import (
    CLOSED,
    FULL,
    OVERHEAD_BYTES,
    REFUSED,
    REPEATED,
    PredictionWriter,
)
from tests.fake_records import AWAY, FakeRecords
from tests.records import prediction


@pytest.fixture
def records():
    return FakeRecords()


@pytest.fixture
def writer(records):
    return PredictionWriter(records)


def test_predictions_are_written_in_order_and_in_batches(records, writer, monkeypatch):
    monkeypatch.setattr(prediction_writer, "MAX_BATCH", 3)
    batch_sizes = []
    add = records.add
    monkeypatch.setattr(records, "add", lambda encoded: batch_sizes.append(len(encoded)) or add(encoded))
    for number in range(8):
        writer.add(prediction(str(number)))
    assert writer.num_waiting == 8
    writer.write()
    assert records.request_ids == [str(number) for number in range(8)]
    assert batch_sizes == [3, 3, 2]
    assert (writer.num_waiting, writer.waiting_bytes, writer.dropped) == (0, 0, {})


def test_a_batch_is_bounded_in_bytes_but_has_at_least_one_prediction(records, writer, monkeypatch):
    monkeypatch.setattr(prediction_writer, "MAX_BATCH_BYTES", 100)
    batch_sizes = []
    monkeypatch.setattr(records, "add", lambda encoded: batch_sizes.append(len(encoded)) or len(encoded))
    for number in range(3):
        assert writer.add(prediction(str(number), rows=[{"text": "x" * 1000}])) > 1000
    writer.write()
    assert batch_sizes == [1, 1, 1]


def test_predictions_wait_while_the_database_is_away(records, writer):
    records.fault = AWAY
    for number in range(10):
        writer.add(prediction(str(number)))
    with pytest.raises(OperationalError, match="away"):
        writer.write()
    assert (writer.num_waiting, writer.dropped) == (10, {})
    records.fault = None
    writer.write()
    assert (writer.num_waiting, len(records.request_ids)) == (0, 10)


def test_the_buffer_is_bounded_in_bytes_and_dropped_predictions_are_counted(records, writer, monkeypatch):
    size_bytes = writer.add(prediction("a", rows=[{"text": "x" * 10_000}]))
    assert size_bytes > 10_000
    limit = 5 * (size_bytes + OVERHEAD_BYTES)
    monkeypatch.setattr(prediction_writer, "MAX_WAITING_BYTES", limit)
    for number in range(20):
        writer.add(prediction(str(number), rows=[{"text": "x" * 10_000}]))
    assert writer.dropped == {FULL: 16}
    assert writer.waiting_bytes <= limit
    assert writer.drop_waiting() == 5
    assert (writer.waiting_bytes, writer.dropped) == (0, {FULL: 16, CLOSED: 5})


@pytest.mark.parametrize("bad", ["never", "odd"])
def test_a_prediction_that_the_database_refuses_is_dropped_and_the_others_are_written(records, writer, bad):
    for request_id in ("a", bad, "b"):
        writer.add(prediction(request_id))
    writer.write()
    assert records.request_ids == ["a", "b"]
    assert (writer.num_waiting, writer.dropped) == (0, {REFUSED: 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"principal": "\ud800"},
        {"rows": [{"text": "\udfff"}]},
        {"rows": [{"age": 2**70}]},
        {"answer": [object()]},
    ],
    ids=["principal", "text", "number", "answer"],
)
def test_a_prediction_that_is_no_json_is_dropped(records, writer, changes):
    assert writer.add(prediction("bad", **changes)) == 0
    writer.add(prediction("good"))
    writer.write()
    assert records.request_ids == ["good"]
    assert writer.dropped == {REFUSED: 1}


def test_a_repeated_request_id_of_a_principal_is_dropped(records, writer):
    writer.add(prediction("a"))
    assert writer.add(prediction("a", version="2")) == 0
    writer.add(prediction("a", principal="ann"))
    writer.add(prediction("a", variant="new", role="shadow"))
    assert writer.dropped == {REPEATED: 1}
    writer.write()
    assert len(records.request_ids) == 3


def test_a_request_id_that_the_database_already_has_is_counted_as_repeated(records, writer, monkeypatch):
    monkeypatch.setattr(records, "add", lambda encoded: len(encoded) - 1)
    writer.add(prediction("a"))
    writer.add(prediction("b"))
    writer.write()
    assert (writer.num_waiting, writer.dropped) == (0, {REPEATED: 1})


def test_a_waiting_prediction_is_found_by_its_principal(writer):
    writer.add(prediction("a"))
    assert writer.find("bob", "a").request_id == "a"
    assert writer.find("eve", "a") is None
    assert writer.find("bob", "b") is None
