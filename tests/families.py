"""Build a model of each family, from its settings to its bundle: the code of all stages in one process."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from app.bundle.bundle import Bundle
from app.jobs import candidate
from app.tasks import Packager, Task, packager_of, task_of
from app.training.trainer import Trained
from tests import without_ray


@dataclass(frozen=True)
class Built:
    """A trained network and its bundle."""

    family: str
    example: ModuleType
    task: Task
    network: torch.nn.Module
    packager: Packager
    trained: Trained
    bundle: Bundle
    home: Path
    """State directory with the stages."""
    validation: tuple[dict[str, float], dict[str, float]]
    """Metrics of the validation part before and after the training."""


def example_of(family: str) -> ModuleType:
    """The example of a family: `MODELS`, `project`, `table` and `answers`."""
    return importlib.import_module(f"tests.unit.tasks.{family}.example")


def tensors(task: Task, part: str) -> dict[str, torch.Tensor]:
    """The arrays of a part."""
    return {name: torch.from_numpy(array) for name, array in task.arrays(task.prepared.frame(part)).items()}


def validate(task: Task, network: torch.nn.Module) -> dict[str, float]:
    network.eval()
    with torch.no_grad():
        return task.metrics(*task.outputs(network, tensors(task, "validation")))


def train(task: Task) -> torch.nn.Module:
    """Train a network as the project says, without checkpoints or a schedule."""
    settings = task.project.training
    with torch.random.fork_rng():
        torch.manual_seed(task.project.seed)
        network = task.network()
        groups = [
            {**group, "lr": settings.learning_rate * group.get("lr_scale", 1.0)}
            for group in task.parameter_groups(network)
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        arrays = tensors(task, "train")
        num_rows = len(next(iter(arrays.values())))
        network.train()
        for _ in range(settings.epochs):
            order = task.arrange(arrays, torch.randperm(num_rows), settings.batch_size)
            for rows in order.split(settings.batch_size):
                optimizer.zero_grad()
                network.loss(*task.batch(arrays, rows)).backward()
                optimizer.step()
    return network.eval()


def build(family: str, name: str, home: Path) -> Built:
    """Prepare, train and package the model `name` of a family's example, in the state directory `home`."""
    example = example_of(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLWAY_HOME", str(home))
        project = example.project(name, home)
        task = task_of(project, without_ray.prepare(project, example.table()))
        with torch.random.fork_rng():
            torch.manual_seed(project.seed)
            untrained = validate(task, task.network())
        network = train(task)
        weights = home / "trained" / name
        weights.mkdir(parents=True)
        save_file(network.state_dict(), weights / "model.safetensors")
        trained = Trained(weights, name, cached=False)
        path = candidate.build(project, task, trained, candidate.baselines(task))
    validation = untrained, validate(task, network)
    return Built(family, example, task, network, packager_of(task), trained, Bundle(path), home, validation)
