"""The training function of each worker of Ray Train: it joins the group of ranks and trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from app.config import Project
from app.data.prepare import Prepared
from app.training import collective, loop
from app.training.observer import Observer
from app.training.workers.progress import Reporter

Wrap = Callable[[Observer], Observer]
"""Function from a rank's observer to one that does more. Ray pickles it for the ranks."""


def train_on_worker(settings: dict[str, Any]) -> None:
    """Train one rank, in a worker of Ray Train.

    `settings` has `project` (JSON), the folders `prepared` and `run`, `progress` (the actor that rank 0
    reports to) and `wrap` (Wrap). Returns nothing, because Ray would send it to the controller.
    """
    project = Project.model_validate_json(settings["project"])
    prepared, run = Prepared(Path(settings["prepared"]), cached=True), Path(settings["run"])
    observer = settings["wrap"](Reporter(settings["progress"], ray.train.get_context().get_world_rank()))
    ranks = collective.join(project.training, run / "timeline.json")
    loop.train(project, prepared, run, ranks, observer, assigned_device(in_group=True))
    ranks.close()


def assigned_device(*, in_group: bool) -> torch.device:
    """The GPU that Ray assigned to this process, or the CPU; makes it PyTorch's current device.

    `in_group` says whether this process is a worker of Ray Train.
    """
    if not ray.get_gpu_ids():
        return torch.device("cpu")
    device = ray.train.torch.get_device() if in_group else torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device
