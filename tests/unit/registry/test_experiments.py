import pytest

from app.errors import UserError
from app.registry import connection, runs
from tests.versions import project


def test_a_store_that_mlflow_does_not_support_is_refused_before_it_is_recorded(monkeypatch):
    monkeypatch.setenv("RAYLWAY_STORE", "nonsense://bucket")
    with (
        pytest.raises(
            UserError, match=r"RAYLWAY_STORE: must be a folder or URL of a store .*; nonsense://bucket: "
        ),
        runs.run(project("elsewhere"), "key"),
    ):
        pass
    monkeypatch.delenv("RAYLWAY_STORE")
    with runs.run(project("elsewhere"), "key") as run:
        assert connection.client().get_run(run.id).info.artifact_uri.startswith("file://")
