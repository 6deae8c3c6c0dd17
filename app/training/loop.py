"""The training loop: what each Horovod rank does, from top to bottom."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import numpy as np
import ray
import ray.train
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

from app.config import Project
from app.data.features import Preprocessor
from app.evaluation.metrics import auc
from app.models import MODELS
from app.training import checkpoint


def train_loop(settings: dict[str, Any]) -> None:
    """`train`, as Ray Train calls it on each rank: what a rank returns must hold no tensors."""
    train(settings)


def train(settings: dict[str, Any]) -> nn.Module:
    """Train one rank's copy of the model and return it, the same on all ranks.

    `settings`: `project` and `preprocessor` as JSON, and `progress`, the actor that hears of each epoch.
    Reports each epoch's metrics with a checkpoint from rank 0, and goes on from the last one if there is.
    An epoch's order of rows and its dropout follow from seed, epoch and rank alone, so a run that was
    interrupted between epochs ends as one that was not. A loss that is no longer finite ends it.
    """
    project = Project.model_validate_json(settings["project"])
    training = project.training
    layout = Preprocessor.model_validate_json(settings["preprocessor"]).layout
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    device = _device()
    torch.set_num_threads(1)
    rows, validation = _shard("train", device), _shard("validation", device)
    num_steps = math.ceil(_largest(len(rows[1])) / training.batch_size)

    torch.manual_seed(project.seed)
    model = MODELS[project.model.kind](project.model, layout).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    gradients = FlatGradients(model)
    dtype = _precision(training.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    history: list[dict[str, float]] = []
    if last := ray.train.get_checkpoint():
        with last.as_directory() as folder:
            state = checkpoint.restore(Path(folder), model, optimizer)
        history = state["history"]
        scaler.load_state_dict(state["scaler"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    for epoch in range(len(history), training.epochs):
        started = time.perf_counter()
        order = _begin_epoch(project.seed, epoch, rank, len(rows[1]), num_steps * training.batch_size).to(
            device
        )
        model.train()
        total = torch.zeros((), device=device)
        for step, batch in enumerate(order.split(training.batch_size)):
            rate = cosine(training.learning_rate, epoch * num_steps + step, training.epochs * num_steps)
            optimizer.param_groups[0]["lr"] = rate
            gradients.zero()
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                loss = log_loss(model(rows[0][batch]), rows[1][batch])
            scaler.scale(loss).backward()
            gradients.average()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
        train_loss = hvd.allreduce(total / num_steps, name="train_loss").item()
        seconds = time.perf_counter() - started

        metrics = {
            "epoch": epoch,
            "train_loss": train_loss,
            **_validate(model, *validation),
            "learning_rate": rate,
            "rows_per_s": num_steps * training.batch_size * size / seconds,
        }
        if not math.isfinite(train_loss + metrics["validation_loss"]):  # the same on every rank
            # No exception: Ray would start the group again, to the same end.
            if rank == 0:
                ray.get(settings["progress"].diverge.remote(epoch))
            break
        history.append(metrics)
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                state = {"history": history, "scaler": scaler.state_dict()}
                checkpoint.save(Path(folder), model, optimizer, state)
                saved = ray.train.Checkpoint.from_directory(folder)
                settings["progress"].add.remote(metrics)
            ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=f"epoch-{epoch:05d}")
    hvd.shutdown()
    return model


class FlatGradients:
    """All gradients as views of one buffer, averaged over the ranks by a single allreduce.

    A small model has many small gradients, and what each allreduce costs is its start, not its bytes.
    """

    def __init__(self, model: nn.Module):
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        for parameter, part in zip(
            parameters, self.buffer.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)

    def zero(self) -> None:
        self.buffer.zero_()

    def average(self) -> None:
        hvd.allreduce_(self.buffer, name="gradients", op=hvd.Average)


def cosine(peak: float, step: int, num_steps: int) -> float:
    """The learning rate of a step: half a cosine from `peak` to 0 (Loshchilov and Hutter, 2017)."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _begin_epoch(seed: int, epoch: int, rank: int, num_rows: int, length: int) -> Tensor:
    """Seed this epoch's dropout; the order of its rows, (length,), the first ones again at the end.

    Every rank takes as many steps as the one with most rows, or the others would wait for it forever.
    """
    for_order, for_dropout = (int(s) for s in np.random.SeedSequence([seed, epoch, rank]).generate_state(2))
    generator = torch.Generator().manual_seed(for_order)
    torch.manual_seed(for_dropout)
    return torch.randperm(num_rows, generator=generator).repeat(math.ceil(length / num_rows))[:length]


def _validate(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Loss and AUC over the validation rows of all ranks."""
    model.eval()
    with torch.no_grad():
        logits = hvd.allgather(model(x).float(), name="validation_logits").cpu()
    labels = hvd.allgather(y, name="validation_labels").cpu()
    loss = log_loss(logits, labels).item()
    score = auc(labels.numpy(), logits.numpy()) if math.isfinite(loss) else math.nan
    return {"validation_loss": loss, "validation_auc": score}


def _shard(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's rows of a part, kept as tensors: the matrix (rows, width) and the labels (rows,)."""
    blocks = list(ray.train.get_dataset_shard(name).iter_batches(batch_size=None, batch_format="numpy"))
    x = torch.cat([torch.as_tensor(block["x"]) for block in blocks])
    y = torch.cat([torch.as_tensor(block["y"]) for block in blocks])
    return x.to(device), y.to(device)


def _largest(count: int) -> int:
    return int(hvd.allgather(torch.tensor([count]), name="rows").max())


def _device() -> torch.device:
    """The GPU that Ray gave to this worker, or the CPU."""
    if not ray.get_gpu_ids():
        return torch.device("cpu")
    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
