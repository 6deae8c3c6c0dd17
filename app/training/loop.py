"""The training loop: what each rank does, from top to bottom."""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from torch import Tensor, nn

from app.config import Project, Training
from app.data.prepare import Prepared
from app.tasks import Arrays, Task, task_of
from app.training import checkpoint, collective, schedule, shards
from app.training.checkpoint import Checkpoints
from app.training.collective import Collective
from app.training.gradients import Gradients
from app.training.watchdog import Watchdog
from app.training.workers.progress import Here, Teller


def train_loop(settings: dict[str, Any]) -> None:
    """`train`, as Ray Train calls it on each rank: what a rank returns must hold no tensors."""
    train(settings)


def train(settings: dict[str, Any], here: Here | None = None) -> nn.Module:
    """Train one rank's copy of the network and return it, the same on all ranks.

    `settings`: `project` as JSON, the folders `prepared` (of the stage before) and `run` (of this training),
    and `progress`, the actor that hears of epochs and of wishes; or `here` hears of them, in this process,
    which is then the only rank. Goes on from the last sound checkpoint.

    All that is random follows from seed, epoch and rank, and a checkpoint holds the rest, so a training that
    was interrupted anywhere ends as one that was not. It ends with `Teller.end`: `finished`, `stopped`
    because somebody asked, `moved` because a node goes away, or `diverged` with a loss that is not finite.
    """
    project = Project.model_validate_json(settings["project"])
    watchdog = Watchdog(project.training.hang_timeout_s)
    try:
        return _train(project, settings, here, watchdog)
    finally:
        watchdog.stop()  # the process may live on


def _train(project: Project, settings: dict[str, Any], here: Here | None, watchdog: Watchdog) -> nn.Module:
    training = project.training
    run = Path(settings["run"])
    _be_deterministic(training)
    ranks = collective.join(training, run / "timeline.json")
    tell = here or Teller(settings["progress"], ranks.rank)
    device = _device(alone=here is not None)
    task = task_of(project, Prepared(Path(settings["prepared"]), cached=True))
    rows, validation = (_load(task, part, ranks, device) for part in ("train", "validation"))
    num_rows = _length(rows)
    num_passes = training.backward_passes_per_step
    most = int(ranks.gather(torch.tensor([num_rows])).max())
    num_steps = math.ceil(most / (training.batch_size * num_passes))

    torch.manual_seed(project.seed)
    network = task.network().to(device)
    groups = task.parameter_groups(network)
    optimizer: Any = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
    gradients = ranks.gradients(network, optimizer)
    optimizer = gradients.optimizer
    dtype = _precision(training.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    checkpoints = Checkpoints(run / "checkpoints", training.checkpoints)
    start = _resume(checkpoints, ranks, tell, network, optimizer, scaler, num_steps)
    history = start.history
    ranks.broadcast(network.state_dict().values())

    def save(epoch: int, step: int, score: float | None, loss: Tensor, wish: str) -> None:
        """Rank 0 writes, behind; the others tell it what only they know. Who wished for it hears of it."""
        random, losses = ranks.gather(_random_state(device)[None]), ranks.gather(loss[None].cpu())
        if ranks.rank == 0:
            tensors = {
                "model": network.state_dict(),
                "optimizer": checkpoint.optimizer_tensors(optimizer),
                "ranks": {"random": random, "loss": losses},
            }
            position = {"epoch": epoch, "step": step, "num_steps": num_steps, "score": score}
            state = {**position, "history": history, "scaler": scaler.state_dict()}
            checkpoints.save(tensors, state)
        if wish == "save":
            checkpoints.wait()
            tell.saved()

    watchdog.beat()  # what came before, loading the rows and finding each other, has time limits of its own
    network.register_forward_hook(lambda *_: watchdog.beat())  # validation takes the time of many steps
    every, look_every, outcome = training.checkpoints.every_steps, 1, ""
    epoch, done = start.epoch, start.step
    for epoch in range(start.epoch, training.epochs):
        if is_stale(training, task.score, history):
            tell.note(f"stopped early: the validation {task.score} no longer rises")
            break
        started = time.perf_counter()
        order = _begin_epoch(
            project.seed, epoch, ranks.rank, num_rows, num_steps * num_passes * training.batch_size
        )
        order = task.arrange(rows, order, training.batch_size).to(device)
        steps = order.view(num_steps, num_passes, training.batch_size)
        first, total = 0, torch.zeros((), device=device)
        if epoch == start.epoch and start.step:
            first = start.step
            total += start.loss
            _set_random_state(start.random, device)
        network.train()
        for step in range(first, num_steps):
            rate = schedule.rate(training, ranks.size, epoch + step / num_steps)
            batches = [task.batch(rows, chosen) for chosen in steps[step]]
            total += _step(batches, gradients, scaler, rate, training.clip_norm, dtype)
            watchdog.beat()
            done = step + 1
            if done == first + 5:
                look_every = _steps_per_look(ranks, tell.look_s, (time.perf_counter() - started) / 5)
            wish = _wish(ranks, tell) if done % look_every == 0 or done == num_steps else ""
            if wish and wish != "save":
                outcome = wish
            if done < num_steps and (wish or (every and done % every == 0)):
                save(epoch, done, None, total, wish)
            if outcome:
                break
        if done < num_steps:
            break
        seconds = time.perf_counter() - started
        ranks.average(train_loss := total / num_steps)
        metrics = {
            "epoch": epoch,
            "train_loss": train_loss.item(),
            **_validate(task, network, validation, ranks),
            "learning_rate": rate,
            "rows_per_s": (num_steps - first) * steps[0].numel() * ranks.size / seconds,
        }
        watchdog.beat()
        if not math.isfinite(metrics["train_loss"] + metrics["validation_loss"]):  # the same on every rank
            outcome = "diverged"  # no exception: Ray would start the group again, to the same end
            break
        history.append(metrics)
        save(epoch + 1, 0, metrics[f"validation_{task.score}"], torch.zeros(()), wish)
        tell.epoch(metrics)
        if outcome:
            break
    checkpoints.wait()
    complete = len(history) == training.epochs or is_stale(training, task.score, history)
    tell.end("finished" if complete else outcome, epoch=epoch, step=done)
    ranks.close()
    return network


def is_stale(training: Training, score: str, history: list[dict[str, float]]) -> bool:
    """Whether early stopping says that enough epochs have gone by without a better validation score."""
    rule = training.early_stopping
    if rule is None or not history:
        return False
    best, best_epoch = -math.inf, 0
    for metrics in history:
        if metrics[f"validation_{score}"] > best + rule.min_delta:
            best, best_epoch = metrics[f"validation_{score}"], int(metrics["epoch"])
    return history[-1]["epoch"] - best_epoch >= rule.patience


def _step(
    batches: list[tuple[Tensor, ...]],
    gradients: Gradients,
    scaler: torch.amp.GradScaler,
    rate: float,
    clip_norm: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """One step of the optimizer on the mean gradient of all batches and ranks; returns this rank's loss."""
    optimizer = gradients.optimizer
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
    with gradients.stepping():
        scaler.step(optimizer)
    scaler.update()
    return torch.stack(losses).sum()


@dataclass
class _Start:
    """Where a training begins: at the very start, or at a checkpoint."""

    history: list[dict[str, float]] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    """Of this rank, summed over the steps of the epoch so far."""
    random: Tensor | None = None
    """This rank's random state; None if it was no rank then."""


def _resume(
    checkpoints: Checkpoints,
    ranks: Collective,
    tell: Teller | Here,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    num_steps: int,
) -> _Start:
    """Load the last sound checkpoint, the same on all ranks, and return the position that it is of.

    With another number of ranks an epoch has another number of steps: it goes on at the same share.
    """
    found = checkpoints.latest(tell.note) if ranks.rank == 0 else None
    place = torch.tensor([int(part) for part in found.name.split("-")] if found else [-1, -1])
    ranks.broadcast([place])
    if place[0] < 0:
        return _Start()
    tensors, state = checkpoint.read(checkpoints.folder_of(*place.tolist()))
    network.load_state_dict(tensors["model"])
    checkpoint.restore_optimizer(optimizer, tensors["optimizer"])
    scaler.load_state_dict(state["scaler"])
    start = _Start(state["history"], state["epoch"])
    if ranks.rank < len(losses := tensors["ranks"]["loss"]):
        start.random, start.loss = tensors["ranks"]["random"][ranks.rank], losses[ranks.rank].item()
    start.step = state["step"] * num_steps // state["num_steps"]
    if start.step != state["step"]:
        start.loss = losses.mean().item() * start.step / state["step"]
    step = f", step {start.step} of {num_steps}" if start.step else ""
    tell.note(f"going on from epoch {start.epoch + 1}{step}, {ranks.size} workers")
    return start


def _begin_epoch(seed: int, epoch: int, rank: int, num_rows: int, length: int) -> Tensor:
    """Seed this epoch's dropout; the order of its rows, (length,), the first ones again at the end.

    Every rank takes as many steps as the one with most rows, or the others would wait for it forever.
    """
    for_order, for_dropout = (int(s) for s in np.random.SeedSequence([seed, epoch, rank]).generate_state(2))
    generator = torch.Generator().manual_seed(for_order)
    torch.manual_seed(for_dropout)
    return torch.randperm(num_rows, generator=generator).repeat(math.ceil(length / num_rows))[:length]


def _random_state(device: torch.device) -> Tensor:
    """The state of torch's generators, the CPU's and the device's, as bytes."""
    state = torch.get_rng_state()
    return state if device.type == "cpu" else torch.cat([state, torch.cuda.get_rng_state(device)])


def _set_random_state(state: Tensor | None, device: torch.device) -> None:
    if state is None:
        return
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # of a view, PyTorch reads where its storage begins
    if device.type != "cpu" and len(state) > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)


def _validate(task: Task, network: nn.Module, arrays: Arrays, ranks: Collective) -> dict[str, float]:
    """The task's metrics over the validation rows of all ranks."""
    network.eval()
    with torch.no_grad():
        outputs = task.outputs(network, arrays)
    joined = [ranks.gather(output).cpu() for output in outputs]
    return {f"validation_{name}": value for name, value in task.metrics(*joined).items()}


def _load(task: Task, part: str, ranks: Collective, device: torch.device) -> dict[str, Tensor]:
    """This rank's rows of a part."""
    arrays = task.arrays(shards.read(task.prepared.part(part), ranks.rank, ranks.size))
    return {name: torch.as_tensor(array).to(device) for name, array in arrays.items()}


def _length(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _wish(ranks: Collective, tell: Teller | Here) -> str:
    """What all ranks are to do after this step: nothing, `save`, `stopped` or `moved`."""
    wishes = ("", "save", "moved", "stopped")  # of several, the last counts
    mine = {"": "", "save": "save", "stop": "stopped"}[tell.wish()]
    if not mine and tell.leaving():
        mine = "moved"
    return wishes[int(ranks.gather(torch.tensor([wishes.index(mine)])).max())]


def _steps_per_look(ranks: Collective, look_s: float, seconds: float) -> int:
    """How many steps of so many seconds make `look_s`, as rank 0 sees it."""
    steps = torch.tensor([max(1, int(look_s / seconds))])
    ranks.broadcast([steps])
    return int(steps)


def _be_deterministic(training: Training) -> None:
    torch.set_num_threads(1)
    if training.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _device(alone: bool) -> torch.device:
    """The GPU that Ray gave to this worker, or the CPU."""
    if not ray.get_gpu_ids():
        return torch.device("cpu")
    device = torch.device("cuda", 0) if alone else ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
