"""What came of a prediction, as clients tell it.

    POST /v2/models/income/feedback
    {"request_id": "0f3c...", "outcomes": [">50K"]}

`outcomes` has, for each row of the request, the label's value, or null where it is not known; `reward`, from
0 to 1, says how good the answer was, and is what a bandit learns from. At least one of the two. The answer
says what became of it, once it is durable:

    201 stored            {"request_id": "0f3c...", "status": "stored"}
    200 stored before     the very same was said before
    202 quarantined       stored apart: the client says more than it may in an hour
    202 unknown request   stored apart: no prediction is recorded for this client's request. It counts once
                          one is that was made before the feedback: predictions are recorded behind answers
    409                   something else was said before, and stays
    410                   too late: the prediction is older than `serving.limits.feedback_days`
    422                   not of this form, an outcome that the label cannot have, or not as many outcomes as
                          the request had rows

A request is its principal's: feedback goes to the sender's own prediction with this request id. A token with
the scope `admin` can name somebody else's in `principal`. What is stored apart keeps no later feedback from
being stored. Outcomes may come one after the other: null says nothing of a row.
"""

import time
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.bundle.schema import Schema
from app.config.serving import Limits
from app.data.cells import NUM_VALUES
from app.serving.gateway.auth import Principal
from app.serving.http import Refused, Response
from app.serving.protocols.contract import UNIT_PATTERN, refusal
from app.serving.replica.recorder import Recorder
from app.state.records import Feedback, Verdict

STATUS = {
    Verdict.STORED: 201,
    Verdict.AGAIN: 200,
    Verdict.QUARANTINED: 202,
    Verdict.UNKNOWN: 202,
    Verdict.CONTRADICTED: 409,
}
DAY_S = 86_400.0

Outcome = Annotated[str, Field(max_length=1024)] | bool | float | None


class Submission(BaseModel):
    """The body of a feedback."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    request_id: str = Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    outcomes: list[Outcome] | None = Field(None, min_length=1, max_length=100_000)
    reward: float | None = Field(None, ge=0, le=1)
    principal: Annotated[str, Field(min_length=1, max_length=256, pattern=UNIT_PATTERN)] | None = None
    """Who got the prediction; the sender, if None."""

    @model_validator(mode="after")
    def _says_something(self) -> "Submission":
        if self.outcomes is None and self.reward is None:
            raise ValueError("must have outcomes, reward, or both")
        return self


def parse(body: bytes, schema: Schema) -> Submission:
    """A feedback about a model's predictions, its outcomes as the label spells them.

    Raises Refused with all that is wrong.
    """
    try:
        said = Submission.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None
    outcomes: list[Outcome] = []
    wrong = []
    for number, value in enumerate(said.outcomes or []):
        try:
            outcomes.append(None if value is None else outcome(value, schema))
        except ValueError as error:
            wrong.append({"path": f"outcomes.{number}", "message": f"{error}, or null"})
    if wrong:
        raise Refused(422, f"the feedback breaks the contract in {len(wrong)} places", wrong)
    return said.model_copy(update={"outcomes": outcomes}) if said.outcomes else said


def outcome(value: str | bool | float, schema: Schema) -> str | float:
    """An outcome as the label spells it. Raises ValueError, which says what it must be.

    Of a binary label, `true` stands for its positive value, and `false` for the other.
    """
    if schema.task == "ranking":  # a rating, or the item that the user took
        if isinstance(value, bool):
            raise ValueError("must be a number or an item")
        return value
    if schema.task == "binary":
        negative = schema.negatives[0] if len(schema.negatives) == 1 else f"not {schema.positive}"
        if isinstance(value, bool):
            return schema.positive if value else negative
        if schema.above is not None and isinstance(value, float):
            return schema.positive if value > schema.above else negative
        if value == negative:
            return negative
    text = value if isinstance(value, str) else f"{value:g}"  # a label of numbers is compared as text
    allowed = schema.classes or [schema.positive, *schema.negatives]
    # A bundle that does not list its negative values takes any text but another spelling of the positive one.
    is_open = schema.task == "binary" and not schema.negatives
    is_misspelt = text.strip().casefold() == schema.positive.strip().casefold()
    if text in allowed or (is_open and not is_misspelt):
        return text
    shown = ", ".join(allowed[:NUM_VALUES]) + (", ..." if len(allowed) > NUM_VALUES else "")
    more = f", or {'a number, ' if schema.above is not None else ''}true or false"
    raise ValueError(f"must be one of {shown}{more if schema.task == 'binary' else ''}")


async def answer(
    said: Submission, model: str, principal: Principal, recorder: Recorder, limits: Limits
) -> Response:
    """Store it, and say what became of it. Raises Refused, or NotStored if the database is away."""
    now = time.time()
    owner = said.principal or principal.name
    if owner != principal.name:
        principal.require("admin", model)
    about = await recorder.find(model, owner, said.request_id)
    if about is not None:
        if now - about.at > limits.feedback_days * DAY_S:
            raise Refused(410, f"the prediction is older than {limits.feedback_days:g} days")
        if said.outcomes is not None and len(said.outcomes) != len(about.rows):
            raise Refused(422, f"outcomes must have {len(about.rows)} values, one for each row")
    content: dict[str, Any] = said.model_dump(include={"outcomes", "reward"}, exclude_none=True)
    verdict = await recorder.judge(
        Feedback(
            model=model,
            request_id=said.request_id,
            said=content,
            principal=owner,
            at=now,
            said_by=principal.name,
            predicted_at=None if about is None else about.at,
        )
    )
    if verdict is Verdict.CONTRADICTED:
        raise Refused(409, "something else was said about this request before, and stays")
    document = {"request_id": said.request_id, "status": verdict.value}
    if verdict is Verdict.UNKNOWN:
        document["reason"] = (
            f"no prediction of this request is recorded for {owner}; the feedback counts once there is one "
            "that was made before it"
        )
    return Response(orjson.dumps(document), STATUS[verdict])
