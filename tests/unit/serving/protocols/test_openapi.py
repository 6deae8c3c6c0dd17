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


def describe(model_schema=None, **options):
    """The OpenAPI document of a model."""
    options = {"secured": False, "feedback": True, **options}
    answer = {"predictions": [{"probability": 0.5, "positive": True}]}
    return openapi.document(
        "income", model_schema or schema(), LIMITS, {"row": ROWS[0], "answer": answer}, **options
    )


def request_body(document, action="predict"):
    content = document["paths"][f"/v2/models/income/{action}"]["post"]["requestBody"]["content"]
    return content["application/json"]


def test_a_client_of_openapi_can_load_the_document():
    loaded = schemathesis.openapi.from_dict(describe())
    assert {operation.ok().label for operation in loaded.get_all_operations()} == {
        "POST /v2/models/income/predict",
        "POST /v2/models/income/explain",
        "POST /v2/models/income/feedback",
        "GET /v2/models/income/ready",
    }


def test_the_example_answer_is_the_answer_to_the_example_request(tmp_path):
    path = build(tmp_path / "bundle", seed=1)
    variants = {"champion": DeployedVariant(version="1", weight=1, path=path)}
    loaded = Loaded(Traffic(salt="1", policy="weighted", variants=variants), max_rows=5)
    document = openapi.document(
        "income", loaded.schema, LIMITS, loaded.example(), secured=False, feedback=True
    )
    document = json.loads(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))
    query = rows.parse(orjson.dumps(request_body(document)["example"]), loaded.contract)
    bundle = Bundle(path)
    answer = Answer(
        model="income", variant="champion", version="1", request_id="0f3c2b7e",
        probabilities=bundle.predict(columns_of(bundle.schema, query.rows)),
    )  # fmt: skip
    expected = json.loads(rows.encode(answer, rows.predictions(answer, bundle.schema)))
    responses = document["paths"]["/v2/models/income/predict"]["post"]["responses"]
    example = responses["200"]["content"]["application/json"]["example"]
    assert np.isclose(
        example["predictions"][0].pop("probability"), expected["predictions"][0].pop("probability")
    )
    assert example == expected


def test_a_row_is_described_by_the_data_contract():
    row = request_body(describe())["schema"]["properties"]["rows"]["items"]
    assert row["required"] == ["age", "education", "gender"]
    assert row["properties"]["age"] == {"type": "number", "minimum": 0, "maximum": 120}
    assert row["properties"]["hours-per-week"] == {"type": "number", "nullable": True}
    assert row["properties"]["gender"] == {"type": "string", "minLength": 1, "enum": ["Female", "Male"]}
    assert row["properties"]["workclass"] == {"type": "string", "minLength": 1, "nullable": True}


@pytest.mark.parametrize("task", ["binary", "classes", "ranking"])
def test_models_of_every_task_are_described(task):
    classes = ["a", "b"] if task == "classes" else []
    model_schema = schema().model_copy(update={"task": task, "classes": classes, "num_items": 7})
    document = describe(model_schema)
    schemathesis.openapi.from_dict(document)
    assert ("k" in request_body(document)["schema"]["properties"]) == (task == "ranking")
    assert ("/v2/models/income/explain" in document["paths"]) == (task != "ranking")


def test_feedback_and_tokens_are_described_only_if_the_endpoint_has_them():
    document = describe(secured=True, feedback=False)
    assert "/v2/models/income/feedback" not in document["paths"]
    assert document["security"] == [{"token": []}]
    assert "security" not in describe()
