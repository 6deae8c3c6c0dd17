"""A stand-in for the records' database that fails when a test says so."""

from sqlalchemy.exc import DataError, OperationalError, TimeoutError

from app.state.feedback import Feedback, FeedbackStatus
from app.state.records import decode

AWAY = OperationalError("INSERT", {}, Exception("away"))
FAULTS = [
    AWAY,
    OperationalError("INSERT", {}, Exception("database is locked")),
    TimeoutError("QueuePool limit of size 5 overflow 10 reached"),
    OSError("disk"),
    RuntimeError("not foreseen"),
]


class FakeRecords:
    """Replaces `Records`: keeps what is written, or raises `fault` if it is set.

    It always rejects the request ids "never" and "odd".
    """

    def __init__(self):
        self.fault = None
        self.predictions_written = []
        self.feedback_batches = []
        self.is_closed = False

    @property
    def request_ids(self):
        return [p.request_id for p in self.predictions_written]

    def add(self, encoded):
        predictions = [decode(content) for content in encoded]
        self._check([p.request_id for p in predictions])
        self.predictions_written += predictions
        return len(predictions)

    def add_feedback(self, batch, per_hour):
        self._check([f.request_id for f in batch])
        self.feedback_batches.append(list(batch))
        return [FeedbackStatus.STORED] * len(batch)

    def predictions(self, model, request_ids, principal):
        self._check([])
        return [
            p
            for p in self.predictions_written
            if (p.model, p.principal) == (model, principal) and p.request_id in request_ids
        ]

    def close(self):
        self.is_closed = True

    def _check(self, request_ids):
        if self.fault:
            raise self.fault
        if "never" in request_ids:
            raise DataError("INSERT", {}, Exception("cannot be stored"))
        if "odd" in request_ids:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")


def feedback(request_id):
    return Feedback("income", request_id, {"reward": 1.0}, "bob", 0.0, "bob")
