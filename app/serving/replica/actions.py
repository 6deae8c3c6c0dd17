"""The actions of an endpoint, one for each path below /v2/models/<name>."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from app.bundle.bundle import Ranking
from app.serving.http import JSON, Refused, Response
from app.serving.protocols import explain, openapi, rows, tensors
from app.serving.protocols.contract import Answer, Query
from app.serving.replica import feedback
from app.serving.replica.call import RETRY_HEADERS, Call
from app.serving.replica.feedback_writer import NotStored
from app.serving.replica.shadow import Copy
from app.state.records import Prediction


@dataclass(frozen=True, kw_only=True)
class Action:
    """A path below the model, and the function that answers a call of it."""

    method: str
    respond: Callable[[Call], Awaitable[Response]]
    scope: str = "predict"
    """Scope that the token must have."""
    has_versions: bool = True
    """Whether the path also exists below /versions/<version>."""
    predicts: bool = False
    """Whether a variant predicts. A client that requests a specific variant needs the scope `admin`."""


async def metadata(call: Call) -> Response:
    """The inputs and outputs of the model, as the Open Inference Protocol describes them."""
    return Response(call.loaded.metadata(call.services.model, call.version))


async def ready(call: Call) -> Response:
    """200: a replica that answers has loaded all of its variants."""
    return Response(orjson.dumps({"name": call.services.model, "ready": True}))


async def describe(call: Call) -> Response:
    """The OpenAPI document of the model's paths."""
    services = call.services
    document = openapi.document(
        services.model,
        call.loaded.schema,
        services.limits,
        call.loaded.example(),
        secured=services.authenticator is not None,
        feedback=services.recorder is not None,
    )
    return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))


async def predict(call: Call) -> Response:
    """Predictions for JSON rows."""
    body = await call.read_body()
    query = rows.parse(body, call.loaded.contract)
    call.choose(query)
    answer = call.answer(await call.predict(query.columns))
    seconds = call.seconds
    predicted = rows.predictions(answer, call.loaded.schema, query.k)
    _record(call, query, answer, seconds, predicted["predictions"])
    return Response(rows.encode(answer, predicted))


async def infer(call: Call) -> Response:
    """Predictions for tensors of the Open Inference Protocol."""
    body = await call.read_body(JSON, "application/octet-stream")
    length = call.request.header(tensors.HEADER_LENGTH.encode()) or None
    inference = tensors.parse(body, length, call.loaded.contract)
    query = inference.query
    call.choose(query)
    answer = call.answer(await call.predict(query.columns))
    seconds = call.seconds
    if call.services.recorder is not None:
        predicted = rows.predictions(answer, call.loaded.schema, query.k)
        _record(call, query, answer, seconds, predicted["predictions"])
    content, media_type, headers = tensors.encode(answer, inference)
    return Response(content, 200, headers, media_type)


async def explain_prediction(call: Call) -> Response:
    """Explanations of the predictions for JSON rows: the contribution of each column."""
    body = await call.read_body()
    query = rows.parse(body, call.loaded.contract)
    explain.require_num_rows(query, call.loaded.schema)
    call.choose(query)
    walks = await asyncio.to_thread(call.loaded.attribution_walks, call.variant)
    answer = call.answer(await call.predict(query.columns))
    bundle = call.loaded.bundles.get(call.variant)
    point_outputs: np.ndarray | Ranking
    async with call.services.explanation_slots:
        # There are many points for each row, so a thread computes and predicts them.
        points = await asyncio.to_thread(walks.points, query.columns)
        if bundle is not None:
            point_outputs = await asyncio.to_thread(bundle.predict, points)
        else:
            point_outputs = await call.predict(points)
    assert not isinstance(point_outputs, Ranking)
    return Response(explain.encode(answer, call.loaded.schema, walks, point_outputs))


async def store_feedback(call: Call) -> Response:
    """Store the outcomes or the reward of a prediction."""
    services = call.services
    if services.recorder is None:
        raise Refused(404, f"{services.model} keeps no records (serving.record), so it takes no feedback")
    submission = feedback.parse(await call.read_body(), call.loaded.schema)
    try:
        return await feedback.store(
            submission, services.model, call.sender, services.recorder, services.limits
        )
    except NotStored:
        raise Refused(
            503, "the feedback cannot be stored now; send it again", headers=RETRY_HEADERS
        ) from None


ACTIONS = {
    "": Action(method="GET", respond=metadata),
    "/ready": Action(method="GET", respond=ready),
    "/openapi.json": Action(method="GET", respond=describe, has_versions=False),
    "/predict": Action(method="POST", respond=predict, predicts=True),
    "/infer": Action(method="POST", respond=infer, predicts=True),
    "/explain": Action(method="POST", respond=explain_prediction, predicts=True, scope="explain"),
    "/feedback": Action(method="POST", respond=store_feedback, has_versions=False, scope="feedback"),
}
"""The actions by path below /v2/models/<name>."""


def _record(call: Call, query: Query, answer: Answer, seconds: float, predictions: list[Any]) -> None:
    """Record an answered prediction, and offer it to the shadows. Does not wait."""
    services = call.services
    if services.recorder is None:
        return
    prediction = Prediction(
        model=services.model,
        request_id=answer.request_id,
        variant=answer.variant,
        version=answer.version,
        role="forced" if call.is_forced else "served",
        unit=call.unit,
        principal=call.sender.name,
        at=call.received_at,
        seconds=seconds,
        rows=query.rows,
        answer=predictions,
    )
    size_bytes = services.recorder.add(prediction)
    services.shadows.offer(Copy(prediction, query.columns, size_bytes))
