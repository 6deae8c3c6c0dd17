import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from ray import serve
from ray.exceptions import RayActorError

from app.bundle.bundle import Ranking
from app.bundle.schema import columns_of
from app.serving.replica.workers import MAX_ATTEMPTS, Worker, WorkerHandle, concatenate, concatenate_columns
from app.serving.traffic.variants import DeployedVariant
from tests.bundles import ROWS, build


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker whose batches have one request each: Serve's batching needs a replica."""
    monkeypatch.setattr(serve, "batch", lambda function, **_: one_by_one(function))
    variant = DeployedVariant(version="1", weight=1, path=build(tmp_path / "1", seed=1))
    return Worker("income", variant, max_batch_rows=4, trusted_keys=())


def one_by_one(function):
    async def call(request):
        (output,) = await function([request])
        return output

    return call


def columns(worker, num_rows):
    return columns_of(worker._bundle.schema, [ROWS[number % len(ROWS)] for number in range(num_rows)])


@pytest.mark.parametrize("num_rows", [1, 4, 11])
def test_a_request_of_any_number_of_rows_is_predicted(worker, num_rows):
    request = columns(worker, num_rows)
    output = asyncio.run(worker.predict(request))
    np.testing.assert_array_equal(output, worker._bundle.predict(request))
    worker.check_health()


def test_each_request_of_a_batch_gets_the_predictions_of_its_rows(worker):
    requests = [columns(worker, num_rows) for num_rows in (1, 3, 2)]
    outputs = asyncio.run(worker._predict_batch(requests))
    assert [len(output) for output in outputs] == [1, 3, 2]
    for request, output in zip(requests, outputs, strict=True):
        np.testing.assert_allclose(output, worker._bundle.predict(request), rtol=1e-6)


class FakeHandle:
    """A deployment handle of Serve's whose first workers die."""

    def __init__(self, num_deaths):
        self.num_calls, self._num_deaths = 0, num_deaths
        self.predict = SimpleNamespace(remote=self._predict)

    async def _predict(self, columns):
        self.num_calls += 1
        if self.num_calls <= self._num_deaths:
            raise RayActorError
        return columns["age"]


@pytest.mark.parametrize("num_deaths", [0, 1, MAX_ATTEMPTS - 1, MAX_ATTEMPTS])
def test_a_request_is_sent_to_another_worker_if_one_dies(monkeypatch, num_deaths):
    handle = FakeHandle(num_deaths)
    monkeypatch.setattr(serve, "get_deployment_handle", lambda name, app_name: handle)
    predict = WorkerHandle("income@1").predict({"age": np.array([1.0])})
    if num_deaths == MAX_ATTEMPTS:
        with pytest.raises(RayActorError):
            asyncio.run(predict)
    else:
        assert asyncio.run(predict) == [1.0]
    assert handle.num_calls == min(num_deaths + 1, MAX_ATTEMPTS)


def test_outputs_and_columns_are_concatenated_in_order():
    first, second = np.array([[1.0], [2.0]]), np.array([[3.0]])
    assert concatenate([first, second]).tolist() == [[1.0], [2.0], [3.0]]
    rankings = [Ranking(np.array([[item]]), np.array([[1.0]]), np.array([True])) for item in "ab"]
    assert concatenate(rankings).items.tolist() == [["a"], ["b"]]
    assert concatenate_columns([{"age": first}, {"age": second}])["age"].tolist() == [[1.0], [2.0], [3.0]]
