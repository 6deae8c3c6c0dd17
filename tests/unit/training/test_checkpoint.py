"""Checkpoints are complete, undamaged, enough to resume from, and pruned as the settings require."""

import contextlib
import itertools
import json
import multiprocessing
import random
import threading
import time

import pytest
import torch
from torch import nn

from app.config.training import Checkpointing
from app.training import checkpoint
from app.training.checkpoint import MANIFEST, Checkpoints, Snapshot


def refuse(note: str) -> None:
    raise AssertionError(f"noted: {note}")


def kept(folder, **settings) -> Checkpoints:
    return Checkpoints(folder, Checkpointing(**settings))


def save(checkpoints: Checkpoints, epoch: int, step: int = 0, score: float | None = None) -> None:
    groups = {"model": {"weight": torch.full((3,), float(epoch))}, "optimizer": {}}
    checkpoints.save(groups, {"epoch": epoch, "step": step, "score": score, "history": []})
    checkpoints.wait()


def names(folder) -> list[str]:
    return sorted(f"{int(f.name[:6])}/{int(f.name[7:])}" for f in folder.glob("[0-9]*"))


# Resuming


def started() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    groups = [{"params": network[0].parameters(), "lr_scale": 0.5}, {"params": network[3].parameters()}]
    return network, torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1, fused=True)


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        x = torch.rand(16, 3)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * group.get("lr_scale", 1) / (1 + step)
        optimizer.zero_grad()
        (network(x).squeeze(1) - x[:, 0]).square().mean().backward()
        optimizer.step()


def test_a_resumed_optimizer_makes_the_same_steps(tmp_path):
    whole = started()
    steps(*whole, 0, 9)

    network, optimizer = started()
    steps(network, optimizer, 0, 4)
    state = {"epoch": 0, "step": 4, "score": None, "history": [{"epoch": 0, "train_loss": 0.1 + 0.2}]}
    tensors = checkpoint.optimizer_tensors(optimizer)
    folder = checkpoint.write(
        tmp_path, Snapshot({"model": network.state_dict(), "optimizer": tensors}, state)
    )

    resumed, other = started()
    steps(resumed, other, 50, 53)  # so that its own state differs
    groups, read = checkpoint.read(folder)
    assert read == state
    resumed.load_state_dict(groups["model"])
    checkpoint.restore_optimizer(other, groups["optimizer"])
    assert [group.get("lr_scale") for group in other.param_groups] == [0.5, None]
    steps(resumed, other, 4, 9)

    for name, value in whole[0].state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    ours, theirs = checkpoint.optimizer_tensors(other), checkpoint.optimizer_tensors(whole[1])
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 * 4
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_without_the_optimizer_state_the_steps_differ():
    """This shows that the test above can fail."""
    whole, (network, optimizer) = started(), started()
    steps(*whole, 0, 9)
    steps(network, optimizer, 0, 4)
    checkpoint.restore_optimizer(optimizer, {})
    steps(network, optimizer, 4, 9)
    assert not torch.equal(network[0].weight, whole[0][0].weight)


def test_before_the_first_step_the_optimizer_has_no_state(tmp_path):
    network, optimizer = started()
    assert checkpoint.optimizer_tensors(optimizer) == {}
    state = {"epoch": 0, "step": 0, "score": None}
    folder = checkpoint.write(tmp_path, Snapshot({"model": network.state_dict(), "optimizer": {}}, state))
    checkpoint.restore_optimizer(optimizer, checkpoint.read(folder)[0]["optimizer"])
    steps(network, optimizer, 0, 1)


def test_a_checkpoint_is_only_safetensors_and_json(tmp_path):
    save(kept(tmp_path), 1)
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [
        MANIFEST,
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    for file in folder.glob("*.json"):
        json.loads(file.read_text())
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


# Written in the background


def test_later_steps_do_not_change_what_is_written(tmp_path, monkeypatch):
    """The write starts only after two hundred more steps."""
    network, optimizer = started()
    steps(network, optimizer, 0, 2)
    write, before = checkpoint.write, {n: t.clone() for n, t in network.state_dict().items()}
    moments = {n: t.clone() for n, t in checkpoint.optimizer_tensors(optimizer).items()}
    stepped = threading.Event()
    monkeypatch.setattr(checkpoint, "write", lambda *a: (stepped.wait(60), write(*a))[1])
    checkpoints = kept(tmp_path)
    groups = {"model": network.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)}
    checkpoints.save(groups, {"epoch": 1, "step": 0, "score": None})
    assert checkpoints.latest(refuse) is None, "the training must not wait for the disk"
    steps(network, optimizer, 2, 200)
    stepped.set()
    checkpoints.wait()
    read, _ = checkpoint.read(checkpoints.latest(refuse))
    assert all(torch.equal(read["model"][name], value) for name, value in before.items())
    assert all(torch.equal(read["optimizer"][name], value) for name, value in moments.items())
    assert not torch.equal(network.state_dict()["0.weight"], before["0.weight"])


def test_tensors_may_change_their_shape_and_be_views(tmp_path):
    checkpoints = kept(tmp_path)
    whole = torch.arange(12.0).view(3, 4)
    for epoch, tensor in enumerate([torch.ones(5), whole.T, whole[:, 1:3], whole.to(torch.float64)], 1):
        checkpoints.save({"model": {"a": tensor}}, {"epoch": epoch, "step": 0, "score": None})
        checkpoints.wait()
        read, _ = checkpoint.read(checkpoints.latest(refuse))
        assert torch.equal(read["model"]["a"], tensor)
        assert read["model"]["a"].dtype == tensor.dtype


@pytest.mark.parametrize("how", ["save", "wait"])
def test_the_next_call_raises_the_error_of_a_failed_write_once(tmp_path, how):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("a file where the folder has to be")
    checkpoints = kept(blocked)
    arguments = ({"model": {"a": torch.ones(2)}}, {"epoch": 1, "step": 0, "score": None})
    checkpoints.save(*arguments)
    with pytest.raises(OSError, match="checkpoints"):
        checkpoints.save(*arguments) if how == "save" else checkpoints.wait()
    blocked.unlink()
    checkpoints.save(*arguments)
    checkpoints.wait()
    assert names(blocked) == ["1/0"]


# Atomic

KILLS = 20


def write_forever(folder, first: int, pipe) -> None:
    checkpoints = kept(folder)
    for step in itertools.count(first):
        tensors = {f"w{i}": torch.full((50_000,), float(step)) for i in range(4)}
        state = {"epoch": 0, "step": step, "score": None}
        checkpoints.save({"model": tensors, "optimizer": tensors}, state)
        pipe.send(step)


def test_a_writer_killed_at_any_moment_leaves_an_undamaged_checkpoint(tmp_path):
    rng, last = random.Random(0), 0
    servers = multiprocessing.get_context("forkserver")  # imports PyTorch once
    servers.set_forkserver_preload([__name__])
    for _ in range(KILLS):
        receiver, sender = servers.Pipe(duplex=False)
        writer = servers.Process(target=write_forever, args=(tmp_path, last + 1, sender))
        writer.start()
        sender.close()
        receiver.recv(), receiver.recv()
        time.sleep(rng.uniform(0, 0.1))
        writer.kill()
        writer.join()
        last_started = 0
        with contextlib.suppress(EOFError):
            while True:
                last_started = receiver.recv()
        latest = kept(tmp_path).latest(lambda note: None)
        groups, state = checkpoint.read(latest)
        # All checkpoints but the last one started are complete: `save` waits for the previous write.
        assert state["step"] >= max(last_started - 1, last + 1)
        for tensors in groups.values():
            assert len(tensors) == 4
            assert all((tensor == state["step"]).all() for tensor in tensors.values())
        last = state["step"]
    assert len(names(tmp_path)) <= 3


# Damage


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit in the tensors": lambda f: flip(f / "model.safetensors"),
    "a flipped bit in the state": lambda f: flip(f / "state.json"),
    "a flipped bit in the manifest": lambda f: flip(f / MANIFEST),
    "truncated tensors": lambda f: (f / "optimizer.safetensors").write_bytes(b"{"),
    "an empty state": lambda f: (f / "state.json").write_bytes(b""),
    "an empty manifest": lambda f: (f / MANIFEST).write_bytes(b""),
    "a manifest of nothing": lambda f: (f / MANIFEST).write_text("{}"),
    "a manifest of another kind": lambda f: (f / MANIFEST).write_text("[]"),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "no tensors": lambda f: (f / "model.safetensors").unlink(),
    "nothing": lambda f: [file.unlink() for file in f.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path, damage):
    checkpoints = kept(tmp_path, keep_last=3)
    for epoch in (1, 2, 3):
        save(checkpoints, epoch, score=epoch / 10)
    damage(checkpoints.folder_of(3, 0))
    notes = []
    assert checkpoints.latest(notes.append) == checkpoints.folder_of(2, 0)
    assert len(notes) == 1
    assert notes[0].startswith("the checkpoint 000003-000000000 is damaged (")
    assert checkpoints.best(notes.append) == checkpoints.folder_of(2, 0)

    damage(checkpoints.folder_of(2, 0))
    assert checkpoints.latest(notes.append) == checkpoints.folder_of(1, 0)
    damage(checkpoints.folder_of(1, 0))
    assert checkpoints.latest(notes.append) is None


def test_without_checkpoints_there_is_no_latest(tmp_path):
    assert kept(tmp_path / "nowhere").latest(refuse) is None


# What is kept

SCORES = [0.5, 0.9, 0.7, 0.9, 0.8, 0.6]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"keep_last": 1, "keep_best": 1}, [2, 6]),
        ({"keep_last": 2, "keep_best": 1}, [2, 5, 6]),
        ({"keep_last": 1, "keep_best": 3}, [2, 4, 5, 6]),
        ({"keep_last": 9, "keep_best": 1}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_last_and_the_best_are_kept_and_the_first_of_equals(tmp_path, settings, left):
    checkpoints = kept(tmp_path, **settings)
    for epoch, score in enumerate(SCORES, 1):
        save(checkpoints, epoch, score=score)
    assert names(tmp_path) == [f"{epoch}/0" for epoch in left]
    assert checkpoints.best(refuse) == checkpoints.folder_of(2, 0)
    assert checkpoints.latest(refuse) == checkpoints.folder_of(6, 0)


def test_checkpoints_within_an_epoch_count_as_last_but_not_as_best(tmp_path):
    checkpoints = kept(tmp_path)
    save(checkpoints, 1, score=0.7)
    for step in (50, 100, 150):
        save(checkpoints, 1, step)
    assert names(tmp_path) == ["1/0", "1/100", "1/150"]
    assert checkpoints.best(refuse) == checkpoints.folder_of(1, 0)


def test_the_newest_write_removes_checkpoints_at_later_positions(tmp_path):
    """With twice as many workers, an epoch has half as many steps. The last two checkpoints are damaged."""
    checkpoints = kept(tmp_path, keep_last=2)
    save(checkpoints, 1, score=0.5)
    save(checkpoints, 1, 900)
    save(checkpoints, 2, score=0.9)
    for folder in (checkpoints.folder_of(1, 900), checkpoints.folder_of(2, 0)):
        flip(folder / "model.safetensors")
    save(checkpoints, 1, 450)
    assert checkpoints.latest(refuse) == checkpoints.folder_of(1, 450)
    assert names(tmp_path) == ["1/450"]


def test_a_position_is_overwritten(tmp_path):
    checkpoints = kept(tmp_path)
    save(checkpoints, 1, score=0.1)
    flip(checkpoints.folder_of(1, 0) / "model.safetensors")
    save(checkpoints, 1, score=0.2)
    assert json.loads((checkpoints.latest(refuse) / "state.json").read_text())["score"] == 0.2
