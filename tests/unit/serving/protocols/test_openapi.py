import json

import numpy as np
import orjson
import pytest
import schemathesis

from app.bundle.bundle import Bundle
from app.bundle.schema import columns_of
from app.config.serving import Limits
from app.serving.protocols import openapi, rows
from app.serving.protocols.contract import Answer
from app.serving.replica.loaded import Loaded
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from tests.bundles import ROWS, build, schema

LIMITS = Limits(max_rows=5)


def described(given=None, row=None, answer=None, **options):
    options = {"secured": False, "feedback": True, **options}
    example = {
        "row": row or ROWS[0],
        "answer": answer or {"predictions": [{"probability": 0.5, "positive": True}]},
    }
    return openapi.document("income", given or schema(), LIMITS, example, **options)


def asked(document, action="predict"):
    content = document["paths"][f"/v2/models/income/{action}"]["post"]["requestBody"]["content"]
    return content["application/json"]


def test_it_can_be_loaded_by_a_client_of_openapi():
    found = schemathesis.openapi.from_dict(described())
    assert {operation.ok().label for operation in found.get_all_operations()} == {
        "POST /v2/models/income/predict",
        "POST /v2/models/income/explain",
        "POST /v2/models/income/feedback",
        "GET /v2/models/income/ready",
    }


def test_the_example_of_a_bundle_is_a_request_that_is_answered_so(tmp_path):
    path = build(tmp_path / "bundle", seed=1)
    variants = {"champion": DeployedVariant(version="1", weight=1, path=path)}
    loaded = Loaded(Traffic(salt="1", policy="weighted", variants=variants), max_rows=5)
    document = openapi.document(
        "income", loaded.schema, LIMITS, loaded.example(), secured=False, feedback=True
    )
    document = json.loads(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))
    question = rows.parse(orjson.dumps(asked(document)["example"]), loaded.contract)
    bundle = Bundle(path)
    given = Answer(
        model="income", variant="champion", version="1", request_id="0f3c2b7e",
        probabilities=bundle.predict(columns_of(bundle.schema, question.rows)),
    )  # fmt: skip
    answers = document["paths"]["/v2/models/income/predict"]["post"]["responses"]["200"]
    answered = json.loads(rows.encode(given, rows.predictions(given, bundle.schema)))
    shown = answers["content"]["application/json"]["example"]
    assert np.isclose(
        shown["predictions"][0].pop("probability"), answered["predictions"][0].pop("probability")
    )
    assert shown == answered


def test_a_row_is_described_as_the_contract_has_it():
    row = asked(described())["schema"]["properties"]["rows"]["items"]
    assert row["required"] == ["age", "education", "gender"]
    assert row["properties"]["age"] == {"type": "number", "minimum": 0, "maximum": 120}
    assert row["properties"]["hours-per-week"] == {"type": "number", "nullable": True}
    assert row["properties"]["gender"] == {"type": "string", "minLength": 1, "enum": ["Female", "Male"]}
    assert row["properties"]["workclass"] == {"type": "string", "minLength": 1, "nullable": True}


@pytest.mark.parametrize("task", ["binary", "classes", "ranking"])
def test_every_task_is_described(task):
    given = schema().model_copy(update={"task": task, "classes": ["a", "b"] if task == "classes" else []})
    given = given.model_copy(update={"num_items": 7})
    document = described(given)
    schemathesis.openapi.from_dict(document)
    assert ("k" in asked(document)["schema"]["properties"]) == (task == "ranking")
    assert ("/v2/models/income/explain" in document["paths"]) == (task != "ranking")


def test_what_is_not_there_is_not_described():
    document = described(secured=True, feedback=False)
    assert "/v2/models/income/feedback" not in document["paths"]
    assert document["security"] == [{"token": []}]
    assert "security" not in described()


def test_the_page_and_what_it_needs():
    for name in openapi.ASSETS:
        assert f"/v2/docs/{name}".encode() in openapi.PAGE
        assert len(openapi.asset(name)) > 10_000
    assert b"http://" not in openapi.PAGE
    assert b"https://" not in openapi.PAGE
