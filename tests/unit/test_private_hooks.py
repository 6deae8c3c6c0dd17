"""The private parts of Ray, Serve, Train, Tune and Optuna that Raylway calls, overrides or sets.

None of them is documented, so an upgrade may rename or drop it without notice. Such an upgrade fails here and
says what has changed. docs/architecture.md lists what each part is used for, and what breaks without it.
"""

import functools
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from app.cli import failures
from app.cluster import flags, session
from app.serving.gateway import guard
from app.tuning import tuner
from tests.unit.test_imports import NAMES, private_parts

RAY = Path(ray.__file__).parent

SIGNATURES = {
    # app.cluster
    "ray._private.ray_constants:env_bool": "(key, default)",
    "ray._private.state:GlobalState._connect_and_get_accessor": "(self)",
    "ray._private.state:GlobalState.get_max_resources_from_cluster_config": "(self)",
    "ray._private.utils:write_ray_address": "(ray_address, temp_dir=None)",
    "ray._raylet:AuthenticationTokenLoader.instance": "()",
    "ray._raylet:AuthenticationTokenLoader.reset_cache": "(self)",
    "ray._raylet:Config.initialize": "(config_list)",
    "ray._raylet:GlobalStateAccessor.get_actor_table": "(self, job_id, actor_state_name)",
    # app.serving
    "ray.serve._private.controller:ServeController.get_proxies": "(self)",
    "ray.serve._private.haproxy:HAProxyManager._reload_haproxy": "(self)",
    "ray.serve.context:_get_global_client": "(raise_if_no_controller_running=True)",
    "ray.serve.handle:DeploymentHandle._init": "(self, **kwargs)",
    # app.training.workers
    "ray._private.state:GlobalState.available_resources_per_node": "(self)",
    "ray._private.state:GlobalState.get_draining_nodes": "(self)",
    "ray.train.torch.config:_TorchBackend.on_shutdown": "(self, worker_group, backend_config)",
    "ray.train.torch.config:_TorchBackend.on_start": "(self, worker_group, backend_config)",
    "ray.train.torch.config:_set_torch_distributed_env_vars": "()",
    "ray.train.v2._internal.execution.callback:ControllerCallback.after_controller_state_update": (
        "(self, previous_state, current_state)"
    ),
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.after_worker_group_start": (
        "(self, worker_group)"
    ),
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.before_worker_group_abort": (
        "(self, worker_group_context)"
    ),
    "ray.train.v2._internal.execution.callback:WorkerGroupCallback.before_worker_group_shutdown": (
        "(self, worker_group)"
    ),
    "ray.train.v2._internal.execution.context:get_train_context": "()",
    "ray.train.v2._internal.execution.controller:TrainController.__init__": (
        "(self, train_fn_ref, train_run_context, scaling_policy, failure_policy, callbacks=None, "
        "validation_config=None)"
    ),
    "ray.train.v2._internal.execution.controller:TrainController.get_result": "(self)",
    "ray.train.v2._internal.execution.controller:TrainController.run": "(self)",
    "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy.__init__": (
        "(self, scaling_config)"
    ),
    "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy._get_reserved_resources": "(self)",
    "ray.train.v2._internal.execution.scaling_policy:"
    "ElasticScalingPolicy.make_decision_for_non_running_worker_group": "(self)",
    "ray.train.v2._internal.execution.scaling_policy:"
    "ElasticScalingPolicy.make_decision_for_running_worker_group": (
        "(self, worker_group_state, worker_group_status)"
    ),
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.__len__": "(self)",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup._get_worker_runtime_env": (
        "(custom_runtime_env)"
    ),
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.execute": "(self, fn, *fn_args, **fn_kwargs)",
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.execute_single": (
        "(self, rank, fn, *fn_args, **fn_kwargs)"
    ),
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.execute_single_async": (
        "(self, rank, fn, *fn_args, **fn_kwargs)"
    ),
    "ray.train.v2._internal.execution.worker_group:WorkerGroup.get_worker_group_state": "(self)",
    "ray.train.v2._internal.execution.worker_group:WorkerGroupState.shutdown": "(self)",
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks": "(self)",
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller": (
        "(self, **controller_init_kwargs)"
    ),
    # app.tuning
    "ray.tune.schedulers.async_hyperband:_Bracket.on_result": "(self, trial, cur_iter, cur_rew)",
    "ray.tune.schedulers:PopulationBasedTraining.on_trial_add": "(self, tune_controller, trial)",
    "ray.tune.search.optuna:OptunaSearch.on_trial_complete": "(self, trial_id, result=None, error=False)",
    "ray.tune.search.optuna:OptunaSearch.on_trial_result": "(self, trial_id, result)",
    "ray.tune.search.optuna:OptunaSearch.save": "(self, checkpoint_path)",
    "ray.tune.search.optuna:OptunaSearch.suggest": "(self, trial_id)",
}
"""Parameters, without annotations, of each private function and of each method that Raylway overrides."""

CONSTANTS = {
    "ray._private.ray_constants:ENABLE_RAY_CLUSTERS_ENV_VAR": "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    "ray._raylet:RAY_NODE_ID_KEY": "ray.io/node-id",
    "ray.serve._private.constants:SERVE_CONTROLLER_NAME": "SERVE_CONTROLLER_ACTOR",
    "ray.serve._private.constants:SERVE_LOGGER_NAME": "ray.serve",
    "ray.serve._private.constants:SERVE_NAMESPACE": "serve",
    "ray.tune.search:Searcher.FINISHED": "FINISHED",
}
"""Value of each private constant."""

SWITCHES = (
    "ray._private.auto_init_hook:enable_auto_connect",
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER",
)
"""Module variables that Raylway sets; their value depends on what ran in this process before."""

CLASSES = (
    "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
    "ray.train.v2._internal.callbacks.metrics:ControllerMetricsCallback",
    "ray.train.v2._internal.callbacks.metrics:WorkerMetricsCallback",
    "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
    "ray.train.v2._internal.execution.controller.state:ResizingState",
    "ray.train.v2._internal.execution.controller.state:RestartingState",
    "ray.train.v2._internal.execution.scaling_policy:ScalingDecision",
    "psycopg.errors:_WaitTimeout",
)
"""Private classes that Raylway subclasses or uses in isinstance."""

CODE = (
    # What Raylway sets or overrides works only as long as the code of Ray and Optuna contains these texts.
    ("ray._private.auto_init_hook:auto_init_ray", "enable_auto_connect"),
    ("ray._private.services:get_node_ip_address", "ray_constants.ENABLE_RAY_CLUSTER"),
    ("ray._private.utils:get_ray_address_file", '"ray_current_cluster"'),
    ("ray._private.worker", 'kwargs.pop("_temp_dir", None)'),
    ("ray.serve._private.common:DeploymentID.to_replica_actor_class_name", 'f"ServeReplica:{self.app_name}:'),
    ("ray.serve._private.default_impl", "handle_options._run_router_in_separate_loop"),
    ("ray.serve._private.haproxy:HAProxyApi._start_and_wait_for_haproxy", '"-f", self.config_file_path'),
    ("ray.serve._private.http_util:_apply_middlewares", "for middleware in"),
    ("ray.serve._private.proxy_state:ProxyStateManager.get_proxy_handles", 'f"fallback-{'),
    ("ray.serve._private.replica", "options = configure_http_middlewares("),
    ("ray.serve._private.replica:UserCallableWrapper.call_destructor", "self._callable.__del__"),
    ("ray.serve._private.replica:UserCallableWrapper.initialize_callable", '"record_autoscaling_stats"'),
    (
        "ray.serve._private.router:SharedRouterLongPollClient",
        "@lru_cache(maxsize=None)\n    def get_or_create(",
    ),
    ("ray.serve._private.router:SingletonThreadRouter", "cls._asyncio_loop = asyncio.new_event_loop()"),
    ("ray.serve.deployment:Deployment.options", "if not _internal and version is not DEFAULT.VALUE:"),
    ("ray.train.v2._internal.execution.context:TrainContext", "preemption_context: PreemptionContext"),
    ("ray.train.v2._internal.execution.controller:TrainController", "self.worker_group_cls.create("),
    (
        "ray.train.v2._internal.execution.controller:TrainController",
        "self._scaling_policy.make_decision_for_non_running_worker_group()",
    ),
    (
        "ray.train.v2._internal.execution.controller:TrainController",
        "self._scaling_policy.make_decision_for_running_worker_group(",
    ),
    (
        "ray.train.v2._internal.execution.controller:TrainController",
        '"after_controller_state_update", previous_state, state',
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy",
        "self._get_reserved_resources()",
    ),
    (
        "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy",
        "self.scaling_config._resources_per_worker_not_none",
    ),
    ("ray.train.v2._internal.execution.worker_group:WorkerGroup", "self._get_worker_runtime_env("),
    ("ray.train.v2._internal.execution.worker_group:WorkerGroup", ".after_worker_group_start(self)"),
    ("ray.train.v2._internal.execution.worker_group:WorkerGroup", ".before_worker_group_shutdown(self)"),
    (
        "ray.train.v2._internal.execution.worker_group:WorkerGroup",
        ".before_worker_group_abort(self._worker_group_context)",
    ),
    (
        "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer.fit",
        "callbacks=self._create_default_callbacks()",
    ),
    (
        "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer.fit",
        "scaling_policy=create_scaling_policy(self.scaling_config)",
    ),
    (
        "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer.fit",
        "result = self._initialize_and_run_controller(",
    ),
    ("ray.tune.schedulers:AsyncHyperBandScheduler.__init__", "self._brackets = ["),
    ("ray.tune.schedulers:PopulationBasedTraining.on_trial_add", "tune_controller.search_alg"),
    ("ray.tune.search.optuna:OptunaSearch.__init__", "self._ot_trials = {}"),
    ("ray.tune.search.optuna:OptunaSearch._setup_study", "self._ot_study = ot.study.create_study("),
    ("ray.tune.search.optuna:OptunaSearch.suggest", "self._ot_trials[trial_id] = self._ot_study.ask()"),
    ("optuna.study:Study.__init__", "self._study_id ="),
    ("optuna.trial:FrozenTrial.__init__", "self._trial_id ="),
)


def parameters(function) -> str:
    """The signature without annotations, and without the parameter that Ray adds to methods of actors."""
    signature = inspect.signature(inspect.unwrap(function))
    named = [p for p in signature.parameters.values() if p.name != "_ray_trace_ctx"]
    bare = [p.replace(annotation=p.empty) for p in named]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


@functools.cache
def source(name: str) -> str:
    """The source of a module, class or function."""
    return inspect.getsource(pkgutil.resolve_name(name))


def test_every_private_part_that_is_used_is_in_this_file():
    text = Path(__file__).read_text()
    parts = {part.rpartition(".")[2] for module in NAMES for part in private_parts(module)}
    assert [part for part in sorted(parts) if part not in text] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_private_function_has_its_signature(name):
    assert parameters(pkgutil.resolve_name(name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_private_constant_has_its_value(name):
    assert pkgutil.resolve_name(name) == CONSTANTS[name]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_private_variable_is_a_switch(name):
    assert isinstance(pkgutil.resolve_name(name), bool)


@pytest.mark.parametrize("name", CLASSES)
def test_a_private_class_exists(name):
    assert inspect.isclass(pkgutil.resolve_name(name))


@pytest.mark.parametrize(("name", "text"), CODE)
def test_the_code_of_ray_and_optuna_uses_what_raylway_sets_or_overrides(name, text):
    assert text in source(name)


def test_a_row_of_the_actor_table_has_the_fields_that_are_read():
    from ray.core.generated.gcs_pb2 import ActorTableData

    assert {"class_name", "required_resources"} <= set(ActorTableData.DESCRIPTOR.fields_by_name)


def test_the_errors_of_a_lost_cluster_exist():
    """`app.cli.failures` has only their names, because importing Ray takes seconds."""
    for name in failures.LOST_PROCESS_ERRORS:
        module, _, attribute = name.rpartition(".")
        assert issubclass(getattr(pkgutil.resolve_name(module), attribute), Exception)


def test_the_guard_removes_every_header_that_controls_serve():
    from ray.serve._private import constants

    pattern = r"SERVE_HTTP_\w+_HEADER|SERVE_MULTIPLEXED_MODEL_ID|SERVE_SESSION_ID"
    headers = {value for name, value in vars(constants).items() if re.fullmatch(pattern, name)}
    headers.remove("x-request-id")  # the guard checks it
    assert {header.replace("_", "-").encode() for header in headers} == guard.CONTROL_HEADERS


def test_the_autoscaling_context_has_the_fields_that_the_policy_reads():
    from ray.serve.config import AutoscalingContext

    assert "aggregated_metrics" in dir(AutoscalingContext)
    assert "target_num_replicas" in inspect.signature(AutoscalingContext).parameters


# Environment variables. Ray ignores one that it does not know, so each must occur in its code.


def environment_variables() -> list[str]:
    """Every variable of Ray, Tune or MLflow that a command or a cluster of Raylway sets."""
    names = {*flags.FLAGS, *session.local_environment(Path("/tmp")), *tuner.TUNE_ENVIRONMENT}
    names |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"}  # app.cluster.local
    return sorted(name for name in names if re.match(r"(RAY|TUNE|MLFLOW|SPT)_", name))


@pytest.fixture(scope="module")
def python_names() -> set[str]:
    """Environment variables in the Python code of Ray and MLflow: string literals outside of comments."""
    unused = {"rllib", "tests", "thirdparty_files", "llm"}
    files = [file for file in RAY.rglob("*.py") if unused.isdisjoint(file.relative_to(RAY).parts)]
    mlflow = Path(importlib.util.find_spec("mlflow").origin)
    files.append(mlflow.with_name("environment_variables.py"))
    names = set()
    for file in files:
        for line in file.read_text().splitlines():
            names.update(re.findall(r"""["']((?:RAY|TUNE|MLFLOW)_\w+)["']""", line.partition("#")[0]))
    return names


@pytest.fixture(scope="module")
def binaries() -> bytes:
    """Ray's compiled code. It contains a string RAY_<name> for each setting of Ray's core."""
    return b"".join((RAY / name).read_bytes() for name in ("_raylet.so", "core/src/ray/raylet/raylet"))


@pytest.mark.parametrize("name", environment_variables())
def test_ray_or_mlflow_reads_each_environment_variable(name, python_names, binaries):
    assert name in python_names or f"{name}\0".encode() in binaries, f"nothing in Ray or MLflow reads {name}"


def test_an_environment_variable_that_nothing_reads_would_be_found(python_names, binaries):
    assert "RAY_SERVE_HAPROXY_NBTHREADS" not in python_names
    assert b"RAY_worker_nicenesses\0" not in binaries


def test_serve_reads_each_flag():
    """Serve reads its flags into constants at import. Each constant must have the value that Raylway sets.

    A constant has the name of its flag, with or without RAY_SERVE_.
    """
    environment = session.local_environment(Path("/tmp/raylway-test"))
    program = (
        "import json\n"
        "from ray.serve._private import constants\n"
        "print(json.dumps({name: str(value) for name, value in vars(constants).items()}))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    constants = json.loads(process.stdout.splitlines()[-1])
    for name, value in environment.items():
        if not name.startswith("RAY_SERVE_"):
            continue
        spellings = {value, f"{value}.0", *({"1": ["True"], "0": ["False"]}.get(value, []))}
        actual = {constants.get(name), constants.get(name.removeprefix("RAY_SERVE_"))}
        assert spellings & actual, f"{name} is {value}, but Serve's constant is {actual}"
    # The guard calls the endpoint directly, which requires that both run in one event loop.
    assert constants["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "False"
    assert constants["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "True"
