import logging

import pytest

from app.serving import logs
from app.serving.gateway.body import ReceivedBody
from app.serving.http import Request

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def request(**headers):
    headers = {name.encode(): value for name, value in headers.items()}
    return Request("POST", "/v2/models/income/predict", headers, ReceivedBody(b"{}"), "r-1")


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01".encode(), TRACE),
        (f"01-{TRACE}-00f067aa0ba902b7-01-more".encode(), TRACE),
        (f"ff-{TRACE}-00f067aa0ba902b7-01".encode(), None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01".encode(), None),
        (f"00-{TRACE}-{'0' * 16}-01".encode(), None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01".encode(), None),
        (b"nonsense", None),
    ],
)
def test_trace_id_comes_from_a_valid_traceparent_header(header, trace):
    assert logs.trace_id(request(traceparent=header)) == trace
    assert logs.trace_id(request()) is None


def test_a_line_has_only_the_fields_with_a_value(caplog):
    with caplog.at_level(logging.INFO, logger=logs.log.name):
        logs.log.propagate = True
        traced = request(traceparent=f"00-{TRACE}-00f067aa0ba902b7-01".encode())
        logs.log_request(traced, 422, 0.0012345678, "", "bob", "the request breaks the contract")
    (record,) = caplog.records
    fields = vars(record)
    assert (fields["request"], fields["trace"], fields["status"]) == ("r-1", TRACE, 422)
    assert (fields["seconds"], fields["principal"]) == (0.001235, "bob")
    assert "variant" not in fields
