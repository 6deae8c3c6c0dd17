"""Checkpoints: all that the training needs to go on as if nothing had happened, in safetensors and JSON.

Written behind the training's back, whole or not at all, and trusted only if every file's hash is right.
"""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.config.training import Checkpointing
from app.state import files

Tensors = Mapping[str, Tensor]
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Snapshot:
    """The state of a training between two steps, detached from it."""

    groups: Mapping[str, Tensors]
    """`model`, `optimizer`, `random`: a file of tensors each."""
    state: Mapping[str, Any]
    """JSON values; has `epoch` and `step`, the position in the data, and `score`, None but after an epoch."""


class Checkpoints:
    """The checkpoints of one training, in a folder that all ranks see; rank 0 writes."""

    def __init__(self, folder: Path, settings: Checkpointing):
        self._folder = folder
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._buffers: dict[str, Tensor] = {}

    def save(self, groups: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        """Copy the tensors and return; they are written behind.

        Waits for the write before, if that is not done, and raises what it raised.
        """
        self.wait()
        copies = {name: self._copy(name, tensors) for name, tensors in groups.items()}
        snapshot = Snapshot(copies, dict(state))
        self._thread = threading.Thread(target=self._write_behind, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last `save` is on the disk. Raises OSError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def folder_of(self, epoch: int, step: int) -> Path:
        """Where the checkpoint of a position is."""
        return self._folder / _name(epoch, step)

    def latest(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose files are all as they were written; `say` hears of damaged ones."""
        for folder in reversed(self._all()):
            if not (fault := damage(folder)):
                return folder
            say(f"the checkpoint {folder.name} is damaged ({fault}); looking for the one before it")
        return None

    def best(self, say: Callable[[str], None]) -> Path:
        """The checkpoint of the epoch with the best score, the first of equals. There must be one.

        `say` hears of better ones that are damaged.
        """
        for _, folder in _best_first(self._scored()):
            if not (fault := damage(folder)):
                return folder
            say(f"the checkpoint {folder.name} is damaged ({fault}); taking the next best")
        raise FileNotFoundError(f"no sound checkpoint of an epoch in {self._folder}")

    def _copy(self, group: str, tensors: Tensors) -> Tensors:
        """Into buffers that are kept: fresh memory costs as much as the copy."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(key := f"{group}/{name}")
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[key] = torch.empty_like(tensor, device="cpu").contiguous()
            copies[name] = buffer.copy_(tensor.detach())
        return copies

    def _write_behind(self, snapshot: Snapshot) -> None:
        try:
            self._prune(write(self._folder, snapshot))
        except BaseException as error:
            self._failure = error

    def _prune(self, newest: Path) -> None:
        """Keep the last and the best.

        What stands after the newest is damaged, or counts the steps of another number of ranks: it would be
        taken for the newest.
        """
        last = [folder for folder in self._all() if folder <= newest][-self._settings.keep_last :]
        scored = [pair for pair in self._scored() if pair[1] <= newest]
        best = _best_first(scored)[: self._settings.keep_best]
        keep = {*last, *(folder for _, folder in best)}
        for folder in set(self._all()) - keep:
            files.discard(folder)

    def _all(self) -> list[Path]:
        return sorted(f for f in self._folder.glob("[0-9]*-[0-9]*") if f.is_dir())

    def _scored(self) -> list[tuple[float, Path]]:
        scored = []
        for folder in self._all():
            try:
                score = json.loads((folder / "state.json").read_text())["score"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: `latest` says so
            if score is not None:
                scored.append((score, folder))
        return scored


def _best_first(scored: list[tuple[float, Path]]) -> list[tuple[float, Path]]:
    return sorted(scored, key=lambda pair: (-pair[0], pair[1].name))


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot into a folder of its own under `folder`: there whole, or not at all."""
    name = _name(snapshot.state["epoch"], snapshot.state["step"])
    draft = folder / f".{name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for group, tensors in snapshot.groups.items():
        save_file(dict(tensors), draft / f"{group}.safetensors")
    (draft / "state.json").write_text(json.dumps(snapshot.state))
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
    """What is wrong with a checkpoint; empty if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        faults = [name for name, digest in manifest.items() if files.sha256(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if "state.json" not in manifest:
        return f"{MANIFEST} is of something else"
    return f"{', '.join(faults)} changed" if faults else ""


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the state that `write` wrote."""
    groups = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    return groups, state(folder)


def state(folder: Path) -> dict[str, Any]:
    """The state alone of what `write` wrote."""
    return json.loads((folder / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `<parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give the optimizer the state that `optimizer_tensors` took; its groups' settings stay as they are."""
    values: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def _name(epoch: int, step: int) -> str:
    """Sorts by position."""
    return f"{epoch:06d}-{step:09d}"
