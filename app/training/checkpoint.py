"""Checkpoints: everything that a training needs to resume with the same result, as safetensors and JSON.

A background thread writes them, each completely or not at all. A checkpoint is read only if every file has
the hash in the manifest.
"""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.config.training import Checkpointing
from app.state import files

Tensors = Mapping[str, Tensor]
"""Tensors by name."""
MANIFEST = "MANIFEST.json"
"""File with the SHA-256 of every other file of a checkpoint."""
STATE = "state.json"
"""File with the values of a checkpoint that are not tensors."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state of a training between two steps."""

    groups: Mapping[str, Tensors]
    """Tensors by name, in a file for each group: `model`, `optimizer`, `ranks`."""
    state: Mapping[str, Any]
    """JSON values by name. `epoch` and `step` are the position in the data; `score` is the validation score
    of a completed epoch, None within one."""


class _Scored(NamedTuple):
    """A checkpoint of a completed epoch."""

    score: float
    folder: Path


class Checkpoints:
    """The checkpoints of one training, in a folder that all ranks can read; rank 0 writes it."""

    def __init__(self, folder: Path, settings: Checkpointing):
        self._folder = folder
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._buffers: dict[str, Tensor] = {}

    def save(self, groups: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        """Copy the tensors and return; a background thread writes them.

        Waits until the previous write is done, and raises its exception if it failed.
        """
        self.wait()
        copies = {name: self._copy(name, tensors) for name, tensors in groups.items()}
        snapshot = Snapshot(copies, dict(state))
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last `save` is on disk. Raises the exception of a write that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def folder_of(self, epoch: int, step: int) -> Path:
        """Folder of the checkpoint of a position."""
        return self._folder / _name(epoch, step)

    def latest(self, on_note: Callable[[str], None]) -> Path | None:
        """The newest undamaged checkpoint, or None. `on_note` receives a line for each damaged one."""
        for folder in reversed(self._all()):
            if not (fault := damage(folder)):
                return folder
            on_note(f"the checkpoint {folder.name} is damaged ({fault}); looking for the one before it")
        return None

    def best(self, on_note: Callable[[str], None]) -> Path:
        """The undamaged checkpoint of the epoch with the best score; of equal ones, the earliest.

        `on_note` receives a line for each damaged one. Raises FileNotFoundError if there is no undamaged one.
        """
        for scored in _best_first(self._scored()):
            folder = scored.folder
            if not (fault := damage(folder)):
                return folder
            on_note(f"the checkpoint {folder.name} is damaged ({fault}); taking the next best")
        raise FileNotFoundError(f"no undamaged checkpoint of a completed epoch in {self._folder}")

    def _copy(self, group: str, tensors: Tensors) -> Tensors:
        """Copy into buffers that later calls reuse: allocating them would take as long as the copy."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(key := f"{group}/{name}")
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[key] = torch.empty_like(tensor, device="cpu").contiguous()
            copies[name] = buffer.copy_(tensor.detach())
        return copies

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._prune(write(self._folder, snapshot))
        except BaseException as error:
            self._failure = error

    def _prune(self, newest: Path) -> None:
        """Remove all checkpoints except the last and the best ones.

        Checkpoints at a position after `newest` are removed too, because they would count as newer. They are
        damaged, or were written with another number of ranks, and so of steps per epoch.
        """
        last = [folder for folder in self._all() if folder <= newest][-self._settings.keep_last :]
        best = _best_first([scored for scored in self._scored() if scored.folder <= newest])
        keep = {*last, *(scored.folder for scored in best[: self._settings.keep_best])}
        for folder in set(self._all()) - keep:
            files.discard(folder)

    def _all(self) -> list[Path]:
        return sorted(f for f in self._folder.glob("[0-9]*-[0-9]*") if f.is_dir())

    def _scored(self) -> list[_Scored]:
        """The checkpoints of completed epochs, including damaged ones whose state is readable."""
        scored = []
        for folder in self._all():
            try:
                score = json.loads((folder / STATE).read_text())["score"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged; `latest` reports it
            if score is not None:
                scored.append(_Scored(score, folder))
        return scored


def _best_first(checkpoints: list[_Scored]) -> list[_Scored]:
    return sorted(checkpoints, key=lambda scored: (-scored.score, scored.folder.name))


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint into a new folder in `folder`, completely or not at all, and return its path."""
    name = _name(snapshot.state["epoch"], snapshot.state["step"])
    draft = folder / f".{name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for group, tensors in snapshot.groups.items():
        save_file(dict(tensors), draft / f"{group}.safetensors")
    (draft / STATE).write_text(json.dumps(snapshot.state))
    manifest = {file.name: files.sha256(file) for file in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps(manifest))
    for file in draft.iterdir():
        files.sync(file)
    files.sync(draft)
    target = folder / name
    files.discard(target)
    draft.rename(target)
    files.sync(folder)
    return target


def damage(folder: Path) -> str:
    """A description of the damage of a checkpoint; empty if it is undamaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        faults = [name for name, digest in manifest.items() if files.sha256(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if STATE not in manifest:
        return f"{MANIFEST} does not list {STATE}"
    return f"{', '.join(faults)} changed" if faults else ""


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the state of a checkpoint, as in `Snapshot`."""
    groups = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    return groups, read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint without its tensors."""
    return json.loads((folder / STATE).read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, by `<index of the parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Load the state that `optimizer_tensors` returned; the settings of the parameter groups stay."""
    values: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def _name(epoch: int, step: int) -> str:
    """Name of a checkpoint's folder; names sort by position."""
    return f"{epoch:06d}-{step:09d}"
