"""What came of a prediction, as clients tell it.

    POST /v2/models/income/feedback
    {"request_id": "0f3c...", "outcomes": [">50K"]}

`outcomes` has, for each row of the request, the label's value, or null where it is not known; `reward`, from
0 to 1, says how good the answer was, and is what a bandit learns from. At least one of the two. The answer
says what became of it, once it is durable:

    201 stored            {"request_id": "0f3c...", "status": "stored"}
    200 stored before     the very same was said before
    202 quarantined       stored apart: the client says more than it may in an hour
    409                   something else was said before, and stays
    410                   too late: the prediction is older than `serving.limits.feedback_days`
    422                   not of this form, or not of as many rows as the request had

A request id that is not known is taken: predictions are recorded behind their answers.
"""

import time
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.bundle import Schema
from app.config.serving import Limits
from app.records import Feedback, Verdict
from app.serving.http import Response
from app.serving.protocol import Refused, refusal
from app.serving.recorder import Recorder

STATUS = {Verdict.STORED: 201, Verdict.AGAIN: 200, Verdict.QUARANTINED: 202, Verdict.CONTRADICTED: 409}
DAY_S = 86_400.0

Outcome = Annotated[str, Field(max_length=1024)] | bool | float | None


class Said(BaseModel):
    """The body of a feedback."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    request_id: str = Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    outcomes: list[Outcome] | None = Field(None, min_length=1, max_length=100_000)
    reward: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _says_something(self) -> "Said":
        if self.outcomes is None and self.reward is None:
            raise ValueError("must have outcomes, reward, or both")
        return self


def parse(body: bytes, schema: Schema) -> Said:
    """A feedback about a model's predictions. Raises Refused with all that is wrong."""
    try:
        said = Said.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None
    wrong = [
        {"path": f"outcomes.{number}", "message": f"must be one of {', '.join(schema.classes)}, or null"}
        for number, outcome in enumerate(said.outcomes or [])
        if schema.classes and outcome is not None and outcome not in schema.classes
    ]
    if wrong:
        raise Refused(422, f"the feedback breaks the contract in {len(wrong)} places", wrong)
    return said


async def answer(said: Said, model: str, principal: str, recorder: Recorder, limits: Limits) -> Response:
    """Store it, and say what became of it. Raises Refused, or DBAPIError if the database is away."""
    now = time.time()
    about = await recorder.find(model, said.request_id)
    if about is not None:
        if now - about.at > limits.feedback_days * DAY_S:
            raise Refused(410, f"the prediction is older than {limits.feedback_days:g} days")
        if said.outcomes is not None and len(said.outcomes) != len(about.rows):
            raise Refused(422, f"outcomes must have {len(about.rows)} values, one for each row")
    content: dict[str, Any] = said.model_dump(exclude={"request_id"}, exclude_none=True)
    verdict = await recorder.judge(Feedback(model, said.request_id, content, principal, now))
    if verdict is Verdict.CONTRADICTED:
        raise Refused(409, "something else was said about this request before, and stays")
    document = {"request_id": said.request_id, "status": verdict.value}
    return Response(orjson.dumps(document), STATUS[verdict])
