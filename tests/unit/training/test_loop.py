"""The training loop of one rank, in this process and without Ray."""

import pytest
import torch

from app.training import checkpoint, loop
from app.training.checkpoint import Checkpoints
from app.training.collective import Alone
from app.training.loop import is_stale, take_step
from app.training.observer import Ending, Observer, Outcome, Request
from tests import tabular

CPU = torch.device("cpu")
STEPS, EPOCHS = 9, 3
"""130 rows in batches of 16."""


class Recorder(Observer):
    """Records the events, and makes one request after a number of steps."""

    poll_interval_s = 0.0

    def __init__(self, request: Request = Request.NONE, after: int = 0):
        self.events: list[tuple] = []
        self.num_steps = 0
        self._request, self._after = request, after

    def begin(self, network, epoch, step):
        self.events.append(("begin", epoch, step))

    def step(self, epoch, step):
        self.num_steps += 1

    def epoch(self, metrics):
        self.events.append(("epoch", metrics["epoch"]))

    def note(self, text):
        self.events.append(("note", text))

    def request(self):
        return self._request if self.num_steps == self._after else Request.NONE

    def saved(self):
        self.events.append(("saved", self.num_steps))

    def end(self, ending):
        self.events.append(("end", ending))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tabular.prepared(tmp_path_factory.mktemp("stages") / "prepared")


@pytest.fixture
def train(prepared, tmp_path):
    """Train in a folder. Returns the parameters of the network, the history and the observer."""

    def run(name="run", observer=None, **training):
        observer = observer or Recorder()
        project = tabular.project(**training)
        network = loop.train(project, prepared, tmp_path / name, Alone(), observer, CPU)
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", project.training.checkpoints)
        latest = checkpoints.latest(pytest.fail)
        history = checkpoint.read_state(latest)["history"] if latest else []
        parameters = torch.cat([p.detach().flatten() for p in network.parameters()])
        return parameters, [{k: v for k, v in e.items() if k != "rows_per_s"} for e in history], observer

    return run


def test_a_whole_training(train):
    parameters, history, recorder = train()
    assert recorder.num_steps == STEPS * EPOCHS
    end = ("end", Ending(Outcome.FINISHED, epoch=2, step=STEPS))
    assert recorder.events == [("begin", 0, 0), ("epoch", 0), ("epoch", 1), ("epoch", 2), end]
    assert [epoch["epoch"] for epoch in history] == [0, 1, 2]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["validation_auc"] > 0.8
    again, same_history, _ = train("again")
    assert torch.equal(again, parameters)
    assert same_history == history


@pytest.mark.parametrize("training", [{}, {"batch_size": 8, "backward_passes_per_step": 2}])
@pytest.mark.parametrize("request_", [Request.STOP, Request.MOVE])
@pytest.mark.parametrize("after", [1, 5, STEPS, STEPS + 4, 3 * STEPS - 1])
def test_a_training_that_ended_on_request_resumes_to_the_same_bits(train, after, request_, training):
    parameters, history, _ = train("uninterrupted", **training)
    _, _, interrupted = train(observer=Recorder(request_, after), **training)
    epoch, step = divmod(after - 1, STEPS)
    outcome = {Request.STOP: Outcome.STOPPED, Request.MOVE: Outcome.MOVED}[request_]
    assert interrupted.events[-1] == ("end", Ending(outcome, epoch, step + 1))
    assert interrupted.num_steps == after

    resumed_parameters, resumed_history, resumed = train(**training)
    assert torch.equal(resumed_parameters, parameters)
    assert resumed_history == history
    assert resumed.num_steps == STEPS * EPOCHS - after
    epoch, step = divmod(after, STEPS)
    text = f"resuming from epoch {epoch + 1}{f', step {step} of {STEPS}' if step else ''}, 1 workers"
    assert [event for event in resumed.events if event[0] == "note"] == [("note", text)]


def test_a_request_after_the_last_step_finds_the_training_finished(train):
    *_, recorder = train(observer=Recorder(Request.STOP, STEPS * EPOCHS))
    assert recorder.events[-1] == ("end", Ending(Outcome.FINISHED, 2, STEPS))


def test_a_finished_training_makes_no_more_steps(train):
    parameters, history, _ = train()
    again, same_history, recorder = train()
    assert recorder.num_steps == 0
    assert recorder.events[-1] == ("end", Ending(Outcome.FINISHED, 2, STEPS))
    assert torch.equal(again, parameters)
    assert same_history == history


@pytest.mark.parametrize("after", [4, STEPS])
def test_a_requested_checkpoint_is_on_disk_when_the_observer_is_called(train, tmp_path, after):
    class Saving(Recorder):
        def saved(self):
            super().saved()
            folder = tmp_path / "run" / "checkpoints"
            self.saved_at = Checkpoints(folder, tabular.project().training.checkpoints).latest(pytest.fail)

    *_, recorder = train(observer=Saving(Request.SAVE, after))
    assert ("saved", after) in recorder.events
    epoch, step = divmod(after, STEPS)
    assert recorder.saved_at.name == f"{epoch:06d}-{step:09d}"
    assert recorder.num_steps == STEPS * EPOCHS


def test_checkpoints_within_an_epoch(train, tmp_path):
    train(epochs=1, checkpoints={"every_steps": 4, "keep_last": 9})
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert names == ["000000-000000004", "000000-000000008", "000001-000000000"]


def test_a_loss_that_is_not_finite_ends_the_training_and_is_not_saved(train):
    _, history, recorder = train(learning_rate=1e38, schedule="constant")
    assert recorder.events[-1] == ("end", Ending(Outcome.DIVERGED, 0, STEPS))
    assert history == []
    assert not [event for event in recorder.events if event[0] == "epoch"]


def test_early_stopping_finishes_the_training_and_reports_it(train):
    early = {"epochs": 9, "early_stopping": {"patience": 1, "min_delta": 0.5}}
    _, history, recorder = train(**early)
    assert len(history) == 2
    note = ("note", "stopped early: the validation auc no longer rises")
    assert recorder.events[-2:] == [("epoch", 1), ("end", Ending(Outcome.FINISHED, 1, STEPS))]
    assert note in recorder.events
    *_, resumed = train(**early)
    assert note in resumed.events
    assert resumed.num_steps == 0


# Early stopping


@pytest.mark.parametrize(
    ("scores", "rule", "stale"),
    [
        ([], {"patience": 1}, False),
        ([0.5], {"patience": 1}, False),
        ([0.5, 0.5], {"patience": 1}, True),
        ([0.5, 0.6, 0.59, 0.58], {"patience": 2}, True),
        ([0.5, 0.6, 0.59, 0.58], {"patience": 3}, False),
        ([0.5, 0.4, 0.3, 0.51], {"patience": 3}, False),
        ([0.5, 0.51, 0.52, 0.53], {"patience": 3, "min_delta": 0.1}, True),
        # Small improvements add up: each score is compared with the last one that counted as better.
        ([0.5, 0.54, 0.58, 0.62], {"patience": 3, "min_delta": 0.1}, False),
    ],
)
def test_a_score_is_stale_if_it_has_not_improved_for_patience_epochs(scores, rule, stale):
    history = [{"epoch": i, "validation_auc": score} for i, score in enumerate(scores)]
    assert is_stale(tabular.project(early_stopping=rule).training, "auc", history) is stale
    assert not is_stale(tabular.project().training, "auc", history)


# One step


class Local:
    """Gradients of one process, which record the order of the calls."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def zero(self):
        self.network.zero_grad()
        self.calls.append("zero")

    def loss(self, x, y):
        return (self.network(x).squeeze(1) - y).square().mean()

    def accumulating(self, last):
        self.calls.append("last" if last else "pass")
        return torch.enable_grad()

    def reduce(self):
        self.calls.append("reduce")


def one_step(passes: int, clip_norm: float | None = None, lr_scale: float = 1.0):
    """One step with 12 rows in `passes` batches: its loss, the change of the weights, and the gradients."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    before = network.weight.detach().clone()
    optimizer = torch.optim.SGD([{"params": network.parameters(), "lr_scale": lr_scale}])
    gradients = Local(network)
    batches = list(
        zip(torch.randn(12, 3).split(12 // passes), torch.randn(12).split(12 // passes), strict=True)
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = take_step(batches, gradients, optimizer, scaler, 0.1, clip_norm, torch.float32)
    return loss, network.weight.detach() - before, gradients


def test_a_step_of_several_passes_equals_that_of_one_large_batch():
    loss, change, gradients = one_step(1)
    assert gradients.calls == ["zero", "last", "reduce"]
    many_loss, many_change, gradients = one_step(3)
    assert gradients.calls == ["zero", "pass", "pass", "last", "reduce"]
    torch.testing.assert_close(many_loss, loss)
    torch.testing.assert_close(many_change, change)


def test_gradients_longer_than_clip_norm_are_shortened_and_others_are_not():
    _, unclipped, gradients = one_step(1)
    norm = torch.nn.utils.get_total_norm([p.grad for p in gradients.network.parameters()]).item()
    _, clipped, _ = one_step(1, clip_norm=norm / 4)
    torch.testing.assert_close(clipped, unclipped / 4, rtol=1e-4, atol=1e-6)
    _, same, _ = one_step(1, clip_norm=norm * 4)
    torch.testing.assert_close(same, unclipped)


def test_lr_scale_of_a_group_multiplies_its_learning_rate():
    torch.testing.assert_close(one_step(1, lr_scale=0.5)[1], 0.5 * one_step(1)[1])
