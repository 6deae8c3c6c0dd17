"""Train on tables in many formats, then predict for their rows through every interface."""

import httpx
import numpy as np
import orjson
import pandas as pd
import pytest

from app import api
from app.bundle.bundle import Bundle
from app.cluster.ports import free_ports
from app.cluster.session import session
from app.config import Project, Serving
from app.errors import UserError
from app.jobs import predict
from app.serving.control import deploy
from app.serving.control.undeploy import undeploy_all
from app.serving.protocols import rows as json_rows
from app.serving.protocols.contract import Contract
from app.serving.traffic.traffic import Traffic
from app.serving.traffic.variants import DeployedVariant
from tests import tables
from tests.tables import TRAINED

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    # Ray Data leaves log files open at the end of a session.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]
SERVED = ["question marks", "booleans for numbers", "awkward names"]
UNWRITABLE = "latin-1 in an unused column"
"""A table for which `predict` is refused: it writes all columns of its input, and one is not UTF-8."""


def project(name: str, folder) -> Project:
    table = TRAINED[name]
    data = table.data(table.write(folder)) | {"split": {"validation": 0.3, "test": 0.3}}
    number, category = data["columns"]
    return Project.model_validate(
        {
            "name": f"table-{[*TRAINED].index(name)}",  # each table has its own champion
            "data": data,
            "features": {number: {"encode": "min_max"}, category: {"encode": "one_hot"}},
            "model": {"kind": "linear"},
            "training": {"num_workers": 1, "epochs": 1, "batch_size": 32, "learning_rate": 0.1},
            "gate": {"beat": []},
            "serving": {"variants": {"champion": {"version": "champion", "weight": 1}}},
        }
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", TRAINED)
def test_predictions_for_a_table_use_its_values_as_training_read_them(name, reach, tmp_path):
    table = TRAINED[name]
    outcome = api.train(project(name, tmp_path / "rows"))
    bundle = Bundle(outcome.bundle)
    data, rows, frame = tables.read(table, tmp_path / "rows")
    expected = bundle.predict({name: frame[name].to_numpy() for name in data.columns})

    source = predict.source(str(data.source.path))
    with session(log_to_driver=False):
        if name == UNWRITABLE:
            with pytest.raises(UserError, match=r"row 2: is not UTF-8; save the file as UTF-8"):
                predict.run(str(outcome.bundle), source, tmp_path / "answers")
            return
        answered = predict.run(str(outcome.bundle), source, tmp_path / "answers")
    assert (answered.num_rows, answered.num_invalid) == (len(frame), 0)
    answers = pd.read_parquet(tmp_path / "answers")
    np.testing.assert_allclose(answers[f"probability{answered.suffix}"], expected, atol=1e-6)

    columns = tables.requested(data, rows)
    body = orjson.dumps({"rows": as_rows(columns)})
    request = json_rows.parse(body, Contract(bundle.schema, len(frame)))
    np.testing.assert_allclose(bundle.predict(request.columns), expected, atol=1e-6)
    predictions = api.predict(outcome, pd.DataFrame(columns, dtype=object))
    np.testing.assert_allclose(predictions["probability"], expected, atol=1e-6)
    if name in SERVED:
        check_endpoint(outcome.bundle, columns, expected)


def as_rows(columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_endpoint(path, columns: dict[str, list], expected: np.ndarray) -> None:
    ports = free_ports(2)
    settings = Serving.model_validate(
        {
            "port": ports[0],
            "grpc_port": ports[1],
            "variants": {"champion": {"version": "1", "weight": 1}},
        }
    )
    variants = {"champion": DeployedVariant(version="1", weight=1, path=path)}
    with session(log_to_driver=False):
        url = deploy.deploy(settings, "table", Traffic(salt="1", policy="weighted", variants=variants))
        try:
            for answers in (by_predict(url, columns), *by_tensors(url, ports[1], columns)):
                np.testing.assert_allclose(answers, expected, atol=1e-6)
        finally:
            undeploy_all()


def by_predict(url: str, columns: dict[str, list]) -> list[float]:
    response = httpx.post(
        f"{url}/v2/models/table/predict", json={"rows": as_rows(columns)}, trust_env=False, timeout=20
    )
    assert response.status_code == 200, response.text
    return [prediction["probability"] for prediction in response.json()["predictions"]]


def by_tensors(url: str, grpc_port: int, columns: dict[str, list]) -> list[np.ndarray]:
    """Predictions over HTTP and over gRPC, from Triton's clients."""
    import tritonclient.grpc
    import tritonclient.http

    answers = []
    for kind, address in (
        (tritonclient.http, url.removeprefix("http://")),
        (tritonclient.grpc, f"127.0.0.1:{grpc_port}"),
    ):
        with kind.InferenceServerClient(address) as client:
            inputs = []
            number, category = columns
            numbers = [v if isinstance(v, float | bool) else np.nan for v in columns[number]]
            strings = ["" if v is None else v for v in columns[category]]
            for name, datatype, values in (
                (number, "FP64", np.array(numbers, dtype=np.float64)),
                (category, "BYTES", np.array(strings, dtype=np.object_)),
            ):
                inputs.append(kind.InferInput(name, [len(values)], datatype))
                inputs[-1].set_data_from_numpy(values)
            answers.append(client.infer("table", inputs).as_numpy("probability")[:, 0])
    return answers
