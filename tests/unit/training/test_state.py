"""The position and state with which a training resumes, also with another number of ranks."""

import pytest
import torch

from app.config.training import Checkpointing
from app.training.checkpoint import Checkpoints
from app.training.collective import Alone
from app.training.state import State


class Rank(Alone):
    """One rank of a group whose other ranks do not run; `position` is what rank 0 broadcasts to it."""

    def __init__(self, rank: int, size: int, position: tuple[int, int] = (2, 30)):
        self.rank, self.size, self._position = rank, size, position

    def broadcast(self, tensors) -> None:
        if self.rank > 0:
            (position,) = tensors
            position.copy_(torch.tensor(self._position))


def resume(folder, steps_per_epoch: int, rank: int = 0, size: int = 2) -> tuple[State, list[str]]:
    """The state after resuming, and the notes."""
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(network.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state, notes = State(network, optimizer, scaler, torch.zeros(()), steps_per_epoch), []
    state.resume(Checkpoints(folder, Checkpointing()), Rank(rank, size), notes.append)
    return state, notes


@pytest.fixture
def halfway(tmp_path):
    """A checkpoint of two ranks, step 30 of 90 in the third epoch; their losses so far are 3 and 5."""
    checkpoints = Checkpoints(tmp_path, Checkpointing())
    random = torch.stack([torch.full((4,), rank, dtype=torch.uint8) for rank in range(2)])
    groups = {
        "model": torch.nn.Linear(2, 1).state_dict(),
        "optimizer": {},
        "ranks": {"random": random, "loss": torch.tensor([3.0, 5.0])},
    }
    position = {"epoch": 2, "step": 30, "steps_per_epoch": 90, "score": None}
    checkpoints.save(groups, {**position, "history": [{"epoch": 0}, {"epoch": 1}], "scaler": {}})
    checkpoints.wait()
    return tmp_path


def test_without_a_checkpoint_training_starts_at_the_beginning(tmp_path):
    state, notes = resume(tmp_path, 90)
    assert (state.epoch, state.step, state.loss, state.history, state.random) == (0, 0, 0.0, [], None)
    assert notes == []


@pytest.mark.parametrize("rank", [0, 1])
def test_training_resumes_where_the_checkpoint_was_written(halfway, rank):
    state, notes = resume(halfway, 90, rank)
    assert (state.epoch, state.step, state.loss, len(state.history)) == (2, 30, [3.0, 5.0][rank], 2)
    assert state.random.tolist() == [rank] * 4
    assert notes == ["resuming from epoch 3, step 30 of 90, 2 workers"]


@pytest.mark.parametrize(("size", "steps_per_epoch", "step"), [(1, 180, 60), (4, 45, 15), (3, 60, 20)])
def test_with_other_ranks_training_resumes_after_the_same_share_of_the_epoch(
    halfway, size, steps_per_epoch, step
):
    state, notes = resume(halfway, steps_per_epoch, size=size)
    assert (state.epoch, state.step) == (2, step)
    assert state.loss / state.step == pytest.approx(4.0 / 30), "the mean loss of a step stays the same"
    assert notes == [f"resuming from epoch 3, step {step} of {steps_per_epoch}, {size} workers"]


def test_a_rank_that_is_new_has_no_random_state_to_restore(halfway):
    assert resume(halfway, 45, rank=0, size=4)[0].random is not None
    assert resume(halfway, 45, rank=3, size=4)[0].random is None


def test_the_last_step_of_a_completed_epoch_is_in_that_epoch(halfway):
    state, _ = resume(halfway, 90)
    assert state.last_step == (2, 30)
    state.step = 90
    state.end_epoch({"epoch": 2})
    assert (state.epoch, state.step, state.loss, len(state.history)) == (3, 0, 0.0, 3)
    assert state.last_step == (2, 90)
