"""Training on Ray with real ranks, some of which are killed or stopped."""

import json
import math
import re
import signal

import pytest

from app.config import projectfile
from tests.integration.conftest import Ranks

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL = ("data.source.limit=3000", "training.batch_size=16", "training.epochs=4")
STEPS = 65
"""Number of steps of one epoch on these rows, by two ranks."""


def small(*overrides: str):
    return projectfile.load("configs/smoke.yaml", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def prepared(ray_cluster):
    from app.data.prepare import prepare

    return prepare(small())


def train(project, prepared, on_epoch=lambda epoch: None, on_note=print, **options):
    from app.training import trainer

    return trainer.train(project, prepared, on_epoch, on_note, fresh=True, **options)


def without_times(history):
    return [{k: v for k, v in epoch.items() if k != "rows_per_s"} for epoch in history]


def check_same(history, other, tolerance=1e-6):
    """Check that two histories have the same epochs with the same metrics."""
    assert len(history) == len(other)
    for one, two in zip(without_times(history), without_times(other), strict=True):
        assert one == pytest.approx(two, rel=0, abs=tolerance)


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """A training without interruption: its history, the reported epochs, and the notes of its ranks."""
    ranks, epochs = Ranks(tmp_path_factory.mktemp("ranks")), []
    trained = train(small(), prepared, epochs.append, wrap=ranks.wrap())
    return trained.history, epochs, ranks


def test_two_processes_end_with_equal_parameters(uninterrupted):
    history, epochs, ranks = uninterrupted
    assert len(set(ranks.pids().values())) == 2
    first, second = ranks.parameters()
    assert first == second
    assert ranks.num_steps() == 4 * STEPS
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2, 3]
    assert history == epochs
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_an_override_that_ray_does_not_call_is_reported(prepared, monkeypatch):
    from app.state import hooks
    from app.training.workers import launch, overrides

    assert list(hooks.reported()) == [], "earlier trainings of this process called all overrides"
    monkeypatch.setattr(overrides, "_called", set())
    monkeypatch.delattr(launch.Trainer, "_create_default_callbacks")
    notes = []
    train(small("training.epochs=1"), prepared, on_note=notes.append)
    assert "Ray Train did not call Trainer._create_default_callbacks: " in notes[0]
    monkeypatch.undo()
    train(small("training.epochs=1"), prepared, on_note=notes.append)
    assert len(notes) == 1
    assert list(hooks.reported()) == []


def test_a_deterministic_training_with_the_same_seed_has_the_same_history(prepared, uninterrupted):
    again = train(small("training.deterministic=true"), prepared).history
    assert without_times(again) == without_times(uninterrupted[0])


def test_ddp_has_the_history_of_horovod(prepared, uninterrupted):
    check_same(train(small("training.backend=ddp"), prepared).history, uninterrupted[0], 1e-5)


def die_once(marker, victim: int, step: int, before=lambda: None):
    """An `on_step`: the rank `victim` calls `before` and kills itself after `step` steps, but only once."""

    def on_step(rank, num_steps):
        import os
        import signal

        if rank == victim and num_steps == step and not marker.exists():
            marker.touch()
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


def test_a_rank_killed_within_an_epoch_costs_the_steps_since_the_last_checkpoint(
    prepared, ranks, uninterrupted, tmp_path
):
    marker, epochs, notes = tmp_path / "killed", [], []
    wrap = ranks.wrap(0.005, on_step=die_once(marker, victim=1, step=2 * STEPS + 30))
    project = small("training.checkpoints.every_steps=20")
    trained = train(project, prepared, epochs.append, notes.append, wrap=wrap)
    assert marker.exists()
    check_same(trained.history, uninterrupted[0])
    assert sorted({epoch["epoch"] for epoch in epochs}) == [0, 1, 2, 3]
    (note,) = notes
    epoch, step = map(
        int, re.match(rf"resuming from epoch (\d), step (\d+) of {STEPS}, 2 workers", note).groups()
    )
    assert (epoch, step) == (3, 20)
    assert 10 <= ranks.num_steps() - 4 * STEPS <= 11
    assert ranks.parameters() == uninterrupted[2].parameters()


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    prepared, ranks, uninterrupted, tmp_path
):
    from app.state.home import home

    runs = home() / "runs"

    def damage():
        import time

        time.sleep(1)  # the checkpoint is written in the background
        last = max(runs.glob("*/checkpoints/[0-9]*"), key=lambda folder: folder.stat().st_mtime_ns)
        (last / "model.safetensors").write_bytes(b"no tensors")

    marker, notes = tmp_path / "killed", []
    wrap = ranks.wrap(on_step=die_once(marker, 0, 2 * STEPS + 30, damage))
    project = small("training.checkpoints.every_steps=20")
    trained = train(project, prepared, on_note=notes.append, wrap=wrap)
    check_same(trained.history, uninterrupted[0])
    damaged, resumed = notes
    assert damaged.startswith("the checkpoint 000002-000000020 is damaged (model.safetensors changed)")
    assert resumed == "resuming from epoch 3, 2 workers"
    assert 30 <= ranks.num_steps() - 4 * STEPS <= 31, "steps of two checkpoint intervals are repeated"


def test_many_settings_work_together_and_write_a_timeline(prepared, ranks, uninterrupted):
    """Each setting changes the training. With all of them it still learns, and stops early."""
    project = small(
        "training.epochs=8",
        "training.learning_rate=0.05",
        "training.schedule=linear",
        "training.warmup_epochs=1.5",
        "training.scale_learning_rate=sqrt",
        "training.clip_norm=0.5",
        "training.class_weights=balanced",
        "training.backward_passes_per_step=3",
        "training.compression=fp16",
        "training.gradients=overlapped",
        "training.early_stopping={patience: 1, min_delta: 0.01}",
        "training.timeline=true",
        "training.horovod={fusion_threshold_mb: 0.5, cycle_time_ms: 2}",
        "training.checkpoints={keep_best: 2, keep_last: 1}",
    )
    notes = []
    trained = train(project, prepared, on_note=notes.append, wrap=ranks.wrap())
    history = trained.history
    assert notes == ["stopped early: the validation auc no longer rises"]
    scores = [epoch["validation_auc"] for epoch in history]
    assert 2 <= len(history) < 8
    assert scores[-1] <= max(scores[:-1]) + 0.01
    assert max(scores) > 0.75
    assert ranks.num_steps() == len(history) * math.ceil(STEPS / 3)
    assert len(set(ranks.parameters())) == 1
    # The rate rises to 0.05 * sqrt(2) in the middle of the second epoch, then falls linearly.
    rates = [epoch["learning_rate"] for epoch in history]
    assert rates[0] < rates[1] < 0.05 * 2**0.5
    # The weights are those of the best epoch.
    assert trained.weights.exists()

    # The trace format of Chrome: a JSON array of events, whose closing bracket may be missing.
    text = (trained.path / "timeline.json").read_text().rstrip().rstrip(",").removesuffix("]")
    events = json.loads(text + "]")
    assert {event["ph"] for event in events} >= {"B", "E", "M"}
    names = {event["args"].get("name") for event in events if event.get("name") == "process_name"}
    assert any("layers" in name for name in names if name), (
        "each bucket has its own line, named by its layers"
    )
    assert sum(event.get("name", "").startswith("NEGOTIATE") for event in events) > len(names)


LONG = ("data.source.limit=4000", "training.batch_size=8", "training.epochs=60")


@pytest.fixture
def training(started):
    """Start `raylway train` with overrides, for a `with` block that follows its output."""

    def start(*overrides: str):
        sets = (argument for override in overrides for argument in ("--set", override))
        return started("train", "configs/smoke.yaml", *sets)

    return start


@pytest.mark.slow
def test_after_sigterm_or_sigint_the_same_command_resumes_from_the_last_step(training, ray_cluster):
    from app.data.prepare import prepare
    from app.training import trainer

    project = projectfile.load("configs/smoke.yaml", [*LONG, "name=stopped"])
    positions = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with training(*LONG, "name=stopped") as process:
            output = []
            for line in process.stdout:
                output.append(line)
                if re.match(r" +epoch \d+/60", line):
                    process.send_signal(number)
                    break
            output += process.stdout.readlines()
            assert process.wait(60) == 128 + number, "".join(output)
        stopped = next(line for line in output if line.startswith("stopped"))
        match = re.fullmatch(
            r"stopped: a checkpoint of epoch (\d+), step (\d+) is kept; "
            r"run the command again to continue from the last checkpoint\n",
            stopped,
        )
        assert match, stopped
        positions.append(tuple(map(int, match.groups())))
        if number == signal.SIGINT:
            epoch, step = positions[0]
            # From a checkpoint after the last step of an epoch, training resumes with the next epoch.
            notes = (f"resuming from epoch {epoch}, step {step} of", f"resuming from epoch {epoch + 1}, 2")
            assert any(note in line for line in output for note in notes), output
    assert (1, 0) < positions[0] < positions[1] < (60, 200)
    with training(*LONG, "name=stopped") as process:
        output = process.stdout.readlines()
        assert process.wait(120) in (0, 3), "".join(output)
    prepared = prepare(project)
    assert prepared.cached
    history = trainer.train(project, prepared, lambda _: None).history
    check_same(history, train(project, prepared).history)


def test_a_training_that_waits_for_cpus_prints_it_and_the_first_signal_ends_it(training, prepared):
    """No rank ever starts: an actor uses all CPUs but one, and preparing data needs that one."""
    import ray

    @ray.remote(num_cpus=ray.cluster_resources()["CPU"] - 1)
    class Greedy:
        def ready(self):
            pass

    greedy = Greedy.remote()
    ray.get(greedy.ready.remote())
    try:
        with training(*SMALL, "training.epochs=5", "name=twice") as process:
            for line in process.stdout:
                if "waiting for 2 CPUs" in line:
                    break
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(60) == 128 + signal.SIGINT
    finally:
        ray.kill(greedy)
    assert "other commands 1" in line
    assert "stopped: it waited for room on the cluster" in rest


@pytest.mark.slow
def test_two_workers_reach_the_score_of_one(prepared, uninterrupted):
    """Two ranks with batches of 16 make as many steps as one rank with 32, but on other batches."""
    history = train(small("training.num_workers=1", "training.batch_size=32"), prepared).history
    assert history[-1]["validation_auc"] == pytest.approx(uninterrupted[0][-1]["validation_auc"], abs=0.02)


def test_too_many_workers_for_the_cluster_are_refused_at_once(ray_cluster):
    from app.cluster import capacity
    from app.errors import UserError

    with pytest.raises(UserError, match=r"training.num_workers needs 999 CPUs, but the cluster has \d+"):
        capacity.current().cpus_per_worker(1, 999, "training.num_workers")
