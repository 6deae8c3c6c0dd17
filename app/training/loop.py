"""The training loop: what each rank does, from top to bottom."""

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from app.config import Project, Training
from app.data.prepare import Prepared
from app.tasks import Arrays, Task, task_of
from app.training import device as devices
from app.training import schedule, shards
from app.training.checkpoint import Checkpoints
from app.training.collective import Collective
from app.training.gradients import Gradients
from app.training.observer import Ending, Observer, Outcome, Request
from app.training.state import State
from app.training.watchdog import Watchdog

NUM_TIMED_STEPS = 5
"""Number of steps that are timed at the start of an epoch, to set the number of steps between two polls."""


def train(
    project: Project,
    prepared: Prepared,
    run: Path,
    ranks: Collective,
    observer: Observer,
    device: torch.device,
) -> nn.Module:
    """Train one rank's copy of the network and return it; it is the same on all ranks.

    `run` is the folder of this training: it resumes from the last undamaged checkpoint there. Raises the
    exception of a checkpoint that could not be written.

    All random choices follow from seed, epoch and rank, and a checkpoint has the rest of the state. So an
    interrupted training ends with the same bits as an uninterrupted one with as many ranks.
    """
    training = project.training
    devices.configure(training)

    # This rank's rows. All ranks make the same number of steps, enough for the rank with most rows.
    task = task_of(project, prepared)
    rows, validation_rows = (_load(task, part, ranks, device) for part in ("train", "validation"))
    num_rows = len(next(iter(rows.values())))
    max_rows = int(ranks.gather(torch.tensor([num_rows])).max())
    batches_per_step, batch_size = training.backward_passes_per_step, training.batch_size
    steps_per_epoch = math.ceil(max_rows / (batches_per_step * batch_size))

    # The network and its optimizer.
    torch.manual_seed(project.seed)
    network = task.network().to(device)
    groups = task.parameter_groups(network)
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
    gradients = ranks.gradients(network)
    dtype = devices.precision(training.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    # The state: all that changes from one step to the next. New, or restored from the last checkpoint.
    state = State(network, optimizer, scaler, torch.zeros((), device=device), steps_per_epoch)
    checkpoints = Checkpoints(run / "checkpoints", training.checkpoints)
    state.resume(checkpoints, ranks, observer.note)
    ranks.broadcast(network.state_dict().values())
    observer.begin(network, state.epoch, state.step)

    # Numbers of this rank's rows in the order of the epoch: (steps, batches of a step, rows of a batch).
    epoch_rows: Tensor | None = None
    poll_every, save_every = 1, training.checkpoints.every_steps  # in steps
    outcome = _outcome(training, task.score, state.history, observer)
    with Watchdog(training.hang_timeout_s) as watchdog:
        watchdog.beat()  # the first beat starts the watch; loading the rows may take longer than its limit
        network.register_forward_hook(lambda *_: watchdog.beat())  # validation takes the time of many steps
        while outcome is None:
            # At the start of an epoch, or when one is resumed: seed the generators, and arrange the rows.
            if epoch_rows is None:
                started, first_step = time.perf_counter(), state.step
                length = steps_per_epoch * batches_per_step * batch_size
                order = shards.begin_epoch(project.seed, state.epoch, ranks.rank, num_rows, length)
                order = task.arrange(rows, order, batch_size).to(device)
                epoch_rows = order.view(steps_per_epoch, batches_per_step, batch_size)
                if state.random is not None:
                    devices.restore_random_state(state.random, device)
                    state.random = None
                network.train()

            # One step.
            rate = schedule.rate(training, ranks.size, state.epoch + state.step / steps_per_epoch)
            batches = [task.batch(rows, row_numbers) for row_numbers in epoch_rows[state.step]]
            state.loss += take_step(batches, gradients, optimizer, scaler, rate, training.clip_norm, dtype)
            state.step += 1
            watchdog.beat()
            observer.step(state.epoch, state.step)

            # Every few steps: agree with the other ranks whether to save, move or stop.
            if state.step == first_step + NUM_TIMED_STEPS:
                step_s = (time.perf_counter() - started) / NUM_TIMED_STEPS
                poll_every = _steps_per_poll(ranks, observer.poll_interval_s, step_s)
            is_poll_due = state.step % poll_every == 0 or state.step == steps_per_epoch
            request = _agreed_request(ranks, observer) if is_poll_due else Request.NONE
            outcome = {Request.MOVE: Outcome.MOVED, Request.STOP: Outcome.STOPPED}.get(request)

            # Once an epoch: evaluate.
            if state.step == steps_per_epoch:
                seconds = time.perf_counter() - started
                num_steps, rows_per_step = steps_per_epoch - first_step, epoch_rows[0].numel() * ranks.size
                train_loss = state.loss / steps_per_epoch
                ranks.average(train_loss)
                metrics = {
                    "epoch": state.epoch,
                    "train_loss": train_loss.item(),
                    **_validate(task, network, validation_rows, ranks),
                    "learning_rate": rate,
                    "rows_per_s": num_steps * rows_per_step / seconds,
                }
                watchdog.beat()
                state.end_epoch(metrics)
                epoch_rows = None
                outcome = _outcome(training, task.score, state.history, observer) or outcome

            # Once an epoch, on request, and every `save_every` steps: save, unless the training diverged.
            is_save_due = state.step == 0 or request or (save_every and state.step % save_every == 0)
            if is_save_due and outcome is not Outcome.DIVERGED:
                state.save(checkpoints, ranks, task.score)
                if request is Request.SAVE:
                    checkpoints.wait()
                    observer.saved()
                if state.step == 0:
                    observer.epoch(state.history[-1])

        checkpoints.wait()
        observer.end(Ending(outcome, *state.last_step))
    return network


def take_step(
    batches: list[tuple[Tensor, ...]],
    gradients: Gradients,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rate: float,
    clip_norm: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Make one optimizer step with the mean gradient of all batches and ranks.

    Returns this rank's mean loss, float32 (). A batch has the arguments of `network.loss`. `rate` is the
    learning rate, which `lr_scale` of a parameter group multiplies. `clip_norm` is the maximum norm of the
    gradient, None for no limit. Forward passes compute in `dtype`.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    gradients.zero()
    losses = []
    for i, batch in enumerate(batches):
        with gradients.accumulating(last=i == len(batches) - 1):
            with torch.autocast(batch[0].device.type, dtype, enabled=dtype is not torch.float32):
                loss = gradients.loss(*batch) / len(batches)
            scaler.scale(loss).backward()
        losses.append(loss.detach())
    gradients.reduce()
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip_norm)
    scaler.step(optimizer)
    scaler.update()
    return torch.stack(losses).sum()


def is_stale(training: Training, score: str, history: list[dict[str, float]]) -> bool:
    """Whether the validation score has not improved for `early_stopping.patience` epochs.

    An epoch improves the score if it exceeds the score of the last improvement by more than `min_delta`.
    `history` has the metrics of each epoch, with `epoch` and `validation_<score>`.
    """
    rule = training.early_stopping
    if rule is None or not history:
        return False
    best, best_epoch = -math.inf, 0
    for metrics in history:
        if metrics[f"validation_{score}"] > best + rule.min_delta:
            best, best_epoch = metrics[f"validation_{score}"], int(metrics["epoch"])
    return history[-1]["epoch"] - best_epoch >= rule.patience


def _outcome(
    training: Training, score: str, history: list[dict[str, float]], observer: Observer
) -> Outcome | None:
    """The outcome after the epochs of `history`, the same on every rank; None if the training continues."""
    if history and not math.isfinite(history[-1]["train_loss"] + history[-1]["validation_loss"]):
        return Outcome.DIVERGED  # no exception: Ray would restart the ranks, and they would diverge again
    if len(history) == training.epochs:
        return Outcome.FINISHED
    if is_stale(training, score, history):
        observer.note(f"stopped early: the validation {score} no longer rises")
        return Outcome.FINISHED
    return None


def _load(task: Task, part: str, ranks: Collective, device: torch.device) -> dict[str, Tensor]:
    """This rank's rows of a part (`train` or `validation`), on the device."""
    arrays = task.arrays(shards.read(task.prepared.part(part), ranks.rank, ranks.size))
    return {name: torch.as_tensor(array).to(device) for name, array in arrays.items()}


def _validate(task: Task, network: nn.Module, arrays: Arrays, ranks: Collective) -> dict[str, float]:
    """The task's metrics over the validation rows of all ranks."""
    network.eval()
    with torch.no_grad():
        outputs = task.outputs(network, arrays)
    gathered = [ranks.gather(output).cpu() for output in outputs]
    return {f"validation_{name}": value for name, value in task.metrics(*gathered).items()}


def _agreed_request(ranks: Collective, observer: Observer) -> Request:
    """The largest request of all ranks, the same on every rank."""
    return Request(int(ranks.gather(torch.tensor([observer.request()])).max()))


def _steps_per_poll(ranks: Collective, interval_s: float, step_s: float) -> int:
    """Number of steps that take about `interval_s`, at least 1, by the step time of rank 0."""
    steps = torch.tensor([max(1, int(interval_s / step_s))])
    ranks.broadcast([steps])
    return int(steps)
