"""MLflow's experiments, one per project, and the end of their runs."""

import contextlib
import os
from collections.abc import Iterator

from mlflow.entities import Run, RunStatus, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from app.errors import Interrupted, UserError
from app.state.home import home


def experiment_of(client: MlflowClient, project: str) -> str:
    """The id of a project's experiment. The first call creates it, with its artifacts in $RAYLWAY_STORE or
    the state directory.

    Raises UserError if MLflow does not support this store.
    """
    experiment = client.get_experiment_by_name(project)
    if experiment is not None:
        return experiment.experiment_id
    store = os.environ.get("RAYLWAY_STORE") or (home() / "artifacts").as_uri()
    try:
        # MLflow would accept any store, keep it for the experiment, and fail when the first bundle is stored.
        get_artifact_repository(store)
    except (MlflowException, ImportError) as error:
        raise UserError(
            f"RAYLWAY_STORE: must be a folder or URL of a store that MLflow supports; {store}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    try:
        return client.create_experiment(project, artifact_location=f"{store}/{project}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return experiment_of(client, project)  # another process created it meanwhile


def run_with_tag(client: MlflowClient, experiment: str, tag: str, value: str) -> Run | None:
    """The newest run of an experiment with a tag; None if there is none."""
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", ViewType.ACTIVE_ONLY, max_results=1)
    return runs[0] if runs else None


@contextlib.contextmanager
def ending(client: MlflowClient, run_id: str) -> Iterator[None]:
    """End a run with the block: FINISHED, KILLED if the user stopped it, FAILED if the block raises another
    error."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
        raise
    except BaseException:
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))
        raise
    client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))


def metric_name(name: str) -> str:
    """A metric's name for MLflow, which allows no @."""
    return name.replace("@", "_at_")
