"""Feedback: the outcomes or the reward of a prediction, as clients report them.

    POST /v2/models/income/feedback
    {"request_id": "0f3c...", "outcomes": [">50K"]}

`outcomes` has the label's value for each row of the request, or null where it is unknown. `reward`, from 0 to
1, rates the answer; bandits learn from it. At least one of the two is required. The response is sent when the
feedback is durable:

    201 stored            {"request_id": "0f3c...", "status": "stored"}
    200 stored before     the same feedback is stored already
    202 quarantined       stored, but does not count: the sender exceeded the limit per hour
    202 unknown request   stored, but does not count yet: no prediction is recorded for this request of the
                          principal. It counts as soon as one is recorded that was made before the feedback;
                          predictions are recorded after their answers are sent
    409                   contradicts feedback that is stored, which stays
    410                   the prediction is older than `serving.limits.feedback_days`
    422                   malformed, an outcome that the label cannot have, or not one outcome for each row

Feedback is matched with the prediction that the sender got for this request id. A sender whose token has the
scope `admin` can name another principal in `principal`. Feedback that does not count is replaced by later
feedback. Outcomes can be sent in parts, with null for the rows that are still unknown.
"""

import time
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.bundle.schema import Schema
from app.config.serving import Limits
from app.data.cells.rules import MAX_SHOWN_VALUES
from app.serving.gateway.auth import Principal
from app.serving.http import Refused, Response
from app.serving.protocols.contract import UNIT_PATTERN, validation_refusal
from app.serving.replica.recorder import Recorder
from app.state.feedback import Feedback, FeedbackStatus

HTTP_STATUS = {
    FeedbackStatus.STORED: 201,
    FeedbackStatus.DUPLICATE: 200,
    FeedbackStatus.QUARANTINED: 202,
    FeedbackStatus.UNKNOWN_REQUEST: 202,
    FeedbackStatus.CONFLICT: 409,
}
DAY_S = 86_400.0

Outcome = Annotated[str, Field(max_length=1024)] | bool | float | None


class Submission(BaseModel):
    """The body of a feedback request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    request_id: str = Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    outcomes: list[Outcome] | None = Field(None, min_length=1, max_length=100_000)
    reward: float | None = Field(None, ge=0, le=1)
    principal: Annotated[str, Field(min_length=1, max_length=256, pattern=UNIT_PATTERN)] | None = None
    """Principal who got the prediction; None for the sender."""

    @model_validator(mode="after")
    def _require_content(self) -> "Submission":
        if self.outcomes is None and self.reward is None:
            raise ValueError("must have outcomes, reward, or both")
        return self


def parse(body: bytes, schema: Schema) -> Submission:
    """Parse the body of a feedback request; outcomes become values of the label.

    Raises Refused with every violation.
    """
    try:
        submission = Submission.model_validate_json(body)
    except ValidationError as error:
        raise validation_refusal(error) from None
    outcomes: list[Outcome] = []
    violations = []
    for row, value in enumerate(submission.outcomes or []):
        try:
            outcomes.append(None if value is None else label_value(value, schema))
        except ValueError as error:
            violations.append({"path": f"outcomes.{row}", "message": f"{error}, or null"})
    if violations:
        raise Refused(422, f"the feedback breaks the contract in {len(violations)} places", violations)
    return submission.model_copy(update={"outcomes": outcomes}) if submission.outcomes else submission


def label_value(outcome: str | bool | float, schema: Schema) -> str | float:
    """The value of the label that an outcome stands for.

    For a binary label, `true` is the positive value and `false` the other one; for a label that is a number
    above a threshold, a number is compared with the threshold. Raises ValueError if the label cannot have the
    outcome; its message is what the outcome must be.
    """
    if schema.task == "ranking":  # a rating, or the item that the user chose
        if isinstance(outcome, bool):
            raise ValueError("must be a number or an item")
        return outcome
    if schema.task == "binary":
        negative = schema.negatives[0] if len(schema.negatives) == 1 else f"not {schema.positive}"
        if isinstance(outcome, bool):
            return schema.positive if outcome else negative
        if schema.above is not None and isinstance(outcome, float):
            return schema.positive if outcome > schema.above else negative
        if outcome == negative:
            return negative
    text = outcome if isinstance(outcome, str) else f"{outcome:g}"  # numeric labels are compared as text
    allowed = schema.classes or [schema.positive, *schema.negatives]
    # Without a list of negative values, every text is accepted except other spellings of the positive value.
    is_open = schema.task == "binary" and not schema.negatives
    is_misspelt = text.strip().casefold() == schema.positive.strip().casefold()
    if text in allowed or (is_open and not is_misspelt):
        return text
    shown = ", ".join(allowed[:MAX_SHOWN_VALUES]) + (", ..." if len(allowed) > MAX_SHOWN_VALUES else "")
    more = f", or {'a number, ' if schema.above is not None else ''}true or false"
    raise ValueError(f"must be one of {shown}{more if schema.task == 'binary' else ''}")


async def store(
    submission: Submission, model: str, sender: Principal, recorder: Recorder, limits: Limits
) -> Response:
    """Store feedback; the response has its status.

    Raises Refused with 403, 409, 410 or 422, and NotStored if the database does not answer.
    """
    now = time.time()
    principal = submission.principal or sender.name
    if principal != sender.name:
        sender.require("admin", model)
    prediction = await recorder.find(model, principal, submission.request_id)
    if prediction is not None:
        if now - prediction.at > limits.feedback_days * DAY_S:
            raise Refused(
                410,
                f"the prediction must be at most {limits.feedback_days:g} days old "
                "(serving.limits.feedback_days), and is older",
            )
        if submission.outcomes is not None and len(submission.outcomes) != len(prediction.rows):
            raise Refused(422, f"outcomes must have {len(prediction.rows)} values, one for each row")
    content: dict[str, Any] = submission.model_dump(include={"outcomes", "reward"}, exclude_none=True)
    status = await recorder.add_feedback(
        Feedback(
            model=model,
            request_id=submission.request_id,
            content=content,
            principal=principal,
            at=now,
            sender=sender.name,
            predicted_at=None if prediction is None else prediction.at,
        )
    )
    if status is FeedbackStatus.CONFLICT:
        raise Refused(409, "the feedback contradicts feedback on this request that is stored and stays")
    document = {"request_id": submission.request_id, "status": status.value}
    if status is FeedbackStatus.UNKNOWN_REQUEST:
        document["reason"] = (
            f"no prediction for this request of {principal} is recorded; the feedback counts as soon as one "
            "is recorded that was made before it"
        )
    return Response(orjson.dumps(document), HTTP_STATUS[status])
