"""The section `training`: optimizer, workers, gradient exchange, checkpoints and recovery."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from app.config.faults import shown
from app.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

MAX_WORKERS = 100_000


def _require_workers(value: Any) -> int | tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WORKERS:
        return value
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)
    if is_pair and 1 <= value[0] <= value[1] <= MAX_WORKERS:
        return value[0], value[1]
    allowed = f"of 1 to {MAX_WORKERS:,}"
    raise ValueError(f"must be a number {allowed}, or [min, max] {allowed}; it is {shown(value)}")


class EarlyStopping(Section):
    """End the training when the validation score stops improving."""

    patience: PositiveInt
    """Number of epochs without a better score after which the training ends."""
    min_delta: NonNegativeFloat = 0.0
    """Minimum increase of the validation score that counts as better."""


class Checkpointing(Section):
    """When checkpoints are written, and which are kept."""

    every_steps: PositiveInt | None = None
    """Number of steps between checkpoints within an epoch, besides the one at the end of each epoch. A
    failure loses the steps since the last checkpoint."""
    keep_best: PositiveInt = 1
    """Number of checkpoints kept of the epochs with the best validation score."""
    keep_last: PositiveInt = 2
    """Number of latest checkpoints kept. If the last one is damaged, the one before it is used."""


class Horovod(Section):
    """Settings of Horovod. They matter little for small models."""

    fusion_threshold_mb: NonNegativeFloat = 8
    """Size in MB up to which overlapped gradients of neighbouring layers are sent together. Raise it for many
    small layers on a slow network; lower it if the first gradients wait long for the last; 0 sends each
    gradient alone."""
    cycle_time_ms: PositiveFloat = 10.0
    """Time in milliseconds between a rank's messages about which gradients are ready, unless the step is
    already waiting for them. A longer time costs the backward pass less; a shorter one sends the first
    gradients earlier."""
    adasum: bool = False
    """Whether gradients are combined by Adasum (Maleki et al., 2021) instead of their mean: the learning rate
    then need not change with a large number of ranks. Needs Horovod built with MPI or NCCL."""
    autotune: bool = False
    """Whether Horovod tunes the fusion threshold and the cycle time during the first steps; for runs of
    hours. The order of sums may change while it tunes, so two runs are not bit-equal."""


class Training(Section):
    """How the model is trained: Adam with decoupled weight decay (AdamW)."""

    backend: Literal["horovod", "ddp"] = "horovod"
    """What exchanges the gradients: Horovod, or PyTorch's DistributedDataParallel. Loop and results are the
    same."""
    num_workers: Annotated[
        int | tuple[int, int], PlainValidator(_require_workers), PlainSerializer(lambda n: n)
    ]
    """Number of workers (ranks), one process each. `[min, max]` is elastic: as many as the cluster has room
    for; the group grows when nodes join and shrinks when they leave."""
    num_cpus: PositiveFloat = 1.0
    """CPUs per worker. The training loop uses one core; with a fraction, workers share a core."""
    num_gpus: float = Field(1.0, gt=0, le=1)
    """GPUs per worker, if it trains on GPUs; with 0.5, two workers share a GPU."""
    epochs: PositiveInt
    """Number of passes over the training part."""
    batch_size: PositiveInt
    """Rows per backward pass and worker."""
    backward_passes_per_step: PositiveInt = 1
    """Gradient accumulation: number of backward passes whose gradients are averaged before the ranks exchange
    them. Pays if the desired batch does not fit memory, or if the network is slower than the passes."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate. With `scale_learning_rate`, that of one worker."""
    scale_learning_rate: Literal["none", "sqrt", "linear"] = "none"
    """Multiply the learning rate by the number of workers (linear; Goyal et al., 2017) or by its square root
    (sqrt, which suits Adam), since the batch of a step grows with the workers."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Number of epochs over which the learning rate rises from 0 to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to 0 along half a cosine or a line, or constant."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay: each step multiplies the weights by 1 - learning rate * weight_decay."""
    clip_norm: PositiveFloat | None = None
    """Maximum norm of the gradient; a longer one is scaled down to it. null: no limit."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight each row's loss by the inverse of its label's share, so that all labels have the same
    total weight. Recall of a rare label rises; the probabilities are no longer calibrated."""
    early_stopping: EarlyStopping | None = None
    """When to end the training early. null: after `epochs`."""
    gradients: Literal["auto", "flat", "overlapped"] = "auto"
    """flat: one buffer, exchanged once after the backward pass; best for small models. overlapped: bucket by
    bucket during the backward pass; best for large models. auto: overlapped from two million parameters
    on."""
    compression: Literal["none", "fp16", "bf16"] = "none"
    """Exchange gradients in 16 bits. Pays if the network is the bottleneck. fp16 overflows above 65504; bf16
    has fewer digits."""
    horovod: Horovod = Horovod()
    """Settings of Horovod; only with `backend: horovod`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU per worker if the cluster has GPUs, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the passes. auto: bf16 on GPUs that support it, fp16 with loss scaling on older ones,
    fp32 on the CPU."""
    deterministic: bool = False
    """Whether a GPU uses only algorithms that give the same bits each time, which are slower. On the CPU, two
    runs with the same seed are identical anyway."""
    checkpoints: Checkpointing = Checkpointing()
    """When checkpoints are written, and which are kept."""
    max_failures: NonNegativeInt = 3
    """Number of times that a lost or hung worker group is restarted from its last checkpoint."""
    hang_timeout_s: PositiveFloat = 45
    """Seconds without a step after which a rank counts as hung and the group is restarted. Must be longer
    than the longest step."""
    timeline: bool = False
    """Whether Horovod records its activity as `timeline.json` beside the history: open it in chrome://tracing
    or ui.perfetto.dev. Slows the training a little."""

    @property
    def min_workers(self) -> int:
        """Smallest number of workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number of workers to train with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.warmup_epochs > self.epochs:
            raise ValueError("warmup_epochs must not exceed epochs")
        if self.backend == "ddp":
            if self.horovod != Horovod():
                raise ValueError("horovod: these settings have no effect with backend: ddp; leave them out")
            if self.timeline:
                raise ValueError("timeline: only Horovod records one; set backend: horovod, or leave it out")
        if self.horovod.adasum and self.compression == "bf16":
            raise ValueError("compression: must be fp16 or none with horovod.adasum; it is bf16")
        return self
