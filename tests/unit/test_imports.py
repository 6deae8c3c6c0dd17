"""Imports follow the layers of `app`, and importing has no side effects. The tests read the source files."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

APP = Path(__file__).parents[2] / "app"
NAMES = {
    ".".join(file.relative_to(APP.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(APP.rglob("*.py"))
}

# Layers, lowest first. A room (a folder of `app`, or a file in it) may import rooms of lower layers only.
LAYERS: tuple[set[str], ...] = (
    {"errors"},
    {"config", "state", "setup"},
    {"console", "cluster", "data"},
    {"bundle"},
    {"evaluation", "registry"},
    {"serving", "tasks"},
    {"training", "monitoring"},
    {"tuning"},
    {"jobs"},
    {"api", "cli"},
    {"__main__"},
)
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}
# Low modules that only COMMANDS may import; other code gets the project, console or cluster as an argument.
FOR_COMMANDS = {
    "app.config.projectfile",
    "app.console",
    "app.cluster.flags",
    "app.cluster.guardian",
    "app.cluster.local",
    "app.cluster.session",
}
COMMANDS = {"api", "cli", "cluster", "jobs", "__main__"}
# Where private parts of a library may be used; tests/unit/test_private_hooks.py checks their signatures.
PRIVATE_ROOMS = ("app.cluster.", "app.serving.control.", "app.training.workers.", "app.tuning.")
LIBRARIES = {"ray", "optuna", "mlflow"}
NOT_PRIVATE = {"_exit", "_mapping", "_replace"}  # documented, despite the underscore
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def room(module: str) -> str:
    """The folder of `app` that a module is in, or the module itself."""
    return module.split(".")[1] if "." in module else module


def tree(module: str) -> ast.Module:
    return ast.parse(NAMES[module].read_text())


def imports(module: str) -> Iterator[str]:
    """All modules that a module imports, at its top or in a function."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in NAMES else node.module


def test_modules_and_their_imports_are_found():
    assert {"app.cli.main", "app.data.features", "app.tasks", "app.training.loop"} <= set(NAMES)
    assert "app.evaluation.metrics" in imports("app.tasks.tabular.task")
    assert "app.jobs.pipeline" in imports("app.cli.train"), "imports inside functions count"


def test_every_room_has_a_layer():
    assert {room(name) for name in NAMES if name != "app"} == set(HEIGHT)


@pytest.mark.parametrize("module", NAMES)
def test_a_module_imports_lower_layers_only(module):
    for imported in imports(module):
        if not imported.startswith("app.") or room(imported) == room(module):
            continue
        source, target = room(module), room(imported)
        assert HEIGHT[target] < HEIGHT[source], f"{module} must not import {imported}"
        assert imported not in FOR_COMMANDS or source in COMMANDS, f"{imported} is for the commands only"


@pytest.mark.parametrize("module", [name for name in NAMES if room(name) != "registry"])
def test_only_the_registry_imports_mlflow(module):
    assert not [name for name in imports(module) if name.split(".")[0] == "mlflow"]


@functools.cache
def own_names() -> set[str]:
    """Names with a leading underscore that `app` itself defines: functions, classes, attributes."""
    names = set()
    for module in NAMES:
        for node in ast.walk(tree(module)):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    names.add(name)
    return names


def private_parts(module: str) -> Iterator[str]:
    """Private names of libraries that a module imports, reads, or passes as a keyword.

    A private attribute counts as a library's if `app` defines no such name.
    """
    for node in ast.walk(tree(module)):
        names = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.Attribute(attr=attr):
                names = [ast.unparse(node)]
                if attr.startswith("_") and not attr.endswith("_") and attr not in own_names() | NOT_PRIVATE:
                    yield attr
            case ast.Constant(value=str(text)):
                names = [text]  # such as a key of sys.modules
            case ast.Call():
                yield from (k.arg for k in node.keywords if k.arg and k.arg.startswith("_"))
        for name in names:
            library, *parts = name.split(".")
            if library in LIBRARIES and any(part.startswith("_") for part in parts):
                yield name


def test_private_parts_are_found():
    parts = {part for module in NAMES for part in private_parts(module)}
    assert {"ray._private.state.state", "ray._raylet.Config", "_internal", "_trial_id"} <= parts
    assert "ray.serve._private.router" in parts, "names in strings count"
    assert not parts & {"_exit", "_mapping", "_loader"}


@pytest.mark.parametrize("module", [name for name in NAMES if not name.startswith(PRIVATE_ROOMS)])
def test_private_parts_of_libraries_are_used_in_private_rooms_only(module):
    assert list(private_parts(module)) == []


@pytest.mark.parametrize("module", NAMES)
def test_no_module_unpickles(module):
    assert not [name for name in imports(module) if name.split(".")[0] in UNPICKLERS]
    for called in calls(module):
        assert called not in {"torch.load", "torch.save", "numpy.load", "np.load", "pd.read_pickle"}, called


def calls(module: str) -> Iterator[str]:
    """The functions that a module calls, as written."""
    yield from (ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call))


def test_only_the_cluster_session_starts_ray():
    assert [name for name in NAMES if "ray.init" in calls(name)] == ["app.cluster.session"]


@pytest.mark.parametrize("module", NAMES)
def test_importing_a_module_runs_no_statement_with_side_effects(module):
    side_effects = [
        ast.unparse(statement)
        for statement in tree(module).body
        if isinstance(statement, ast.Expr | ast.For | ast.While | ast.With | ast.Try | ast.Delete)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    ]
    if module == "app.registry":  # MLflow reads these when it is first imported
        side_effects = [
            line for line in side_effects if not line.startswith("os.environ.setdefault('MLFLOW_")
        ]
    assert side_effects == []
