"""How a model is fitted: the steps, the ranks, and what keeps them going."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from app.config.faults import shown
from app.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

MAX_WORKERS = 100_000


def _workers(value: Any) -> int | tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WORKERS:
        return value
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)
    if is_pair and 1 <= value[0] <= value[1] <= MAX_WORKERS:
        return value[0], value[1]
    allowed = f"of 1 to {MAX_WORKERS:,}"
    raise ValueError(f"must be a number {allowed}, or [min, max] {allowed}; it is {shown(value)}")


class EarlyStopping(Section):
    """End the training when the validation score no longer rises."""

    patience: PositiveInt
    """Epochs without a better score."""
    min_delta: NonNegativeFloat = 0.0
    """What counts as better."""


class Checkpointing(Section):
    """When the training is written down, and what is kept of it."""

    every_steps: PositiveInt | None = None
    """A checkpoint each so many steps within an epoch, beside the one at each epoch's end. A failure costs
    what was done since the last one."""
    keep_best: PositiveInt = 1
    """Epochs with the best validation score."""
    keep_last: PositiveInt = 2
    """Latest ones: should the last be damaged, the one before it serves."""


class Horovod(Section):
    """Horovod's own settings. On small models none matters much; see each."""

    fusion_threshold_mb: NonNegativeFloat = 8
    """Overlapped gradients of neighbouring layers are sent together, up to this size. Larger pays on slow
    links with many small layers, smaller where the last ones are long in coming; 0 sends each alone."""
    cycle_time_ms: PositiveFloat = 10.0
    """How long a rank waits between rounds of messages about what is ready, unless the step waits for it
    already. Longer takes less from the backward pass; shorter sends the first gradients earlier."""
    adasum: bool = False
    """Combine gradients by Adasum (Maleki et al., 2021) instead of their mean: large numbers of ranks then
    need no other learning rate. Needs Horovod built with MPI or NCCL."""
    autotune: bool = False
    """Let Horovod search the cycle time, and how many of the above it sends together, during the first steps;
    for runs of hours. The order of sums may change while it searches, so two runs are not bit-equal."""


class Training(Section):
    """How the model is fitted: Adam with decoupled weight decay."""

    backend: Literal["horovod", "ddp"] = "horovod"
    """What carries the gradients: Horovod, or PyTorch's DistributedDataParallel. The same loop, the same
    numbers."""
    num_workers: Annotated[int | tuple[int, int], PlainValidator(_workers), PlainSerializer(lambda n: n)]
    """Ranks, one process each. `[min, max]` is elastic: as many as the cluster has room for, more when nodes
    come, fewer when they go."""
    num_cpus: PositiveFloat = 1.0
    """Of each worker. Its loop uses one core; with a fraction, workers share one."""
    num_gpus: float = Field(1.0, gt=0, le=1)
    """Of each worker when it trains on GPUs; with 0.5, two workers share one."""
    epochs: PositiveInt
    batch_size: PositiveInt
    """Rows per pass and worker."""
    backward_passes_per_step: PositiveInt = 1
    """Gradient accumulation: passes whose gradients are averaged before the ranks exchange them. Pays when
    the batch that you want does not fit memory, or the network is slower than the passes."""
    learning_rate: float = Field(gt=0)
    """At the peak, for one worker if `scale_learning_rate` is set, else as it is."""
    scale_learning_rate: Literal["none", "sqrt", "linear"] = "none"
    """Times the number of workers (Goyal et al., 2017), or its square root, which suits Adam: the batch grows
    with the workers."""
    warmup_epochs: NonNegativeFloat = 0.0
    """The learning rate rises from 0 over so many epochs."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: half a cosine or a line down to 0, or no change."""
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = None
    """Gradients longer than this are shortened to it."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a row counts in the loss by the inverse of its label's share, so that all labels together
    count the same. Finds more of a rare label; the probabilities are no longer calibrated."""
    early_stopping: EarlyStopping | None = None
    gradients: Literal["auto", "flat", "overlapped"] = "auto"
    """flat: one buffer and one exchange after the backward pass, best for small models. overlapped: bucket by
    bucket while the backward pass goes on, best for large ones. auto goes by the number of parameters."""
    compression: Literal["none", "fp16", "bf16"] = "none"
    """Exchange gradients in 16 bits. Pays when the network is the bottleneck; fp16 may overflow above 65504,
    bf16 has fewer digits."""
    horovod: Horovod = Horovod()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each worker when the cluster has them, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp16 with loss scaling on older ones, fp32 on the CPU."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, also on a GPU, where they are slower; on the CPU
    two runs with one seed are identical anyway."""
    checkpoints: Checkpointing = Checkpointing()
    max_failures: NonNegativeInt = 3
    """How many times a lost or hung worker group is started again from its last checkpoint."""
    hang_timeout_s: PositiveFloat = 45
    """A rank that makes no step for so long is given up, and the group started again. Must be longer than
    the longest step."""
    timeline: bool = False
    """Record what Horovod did when, as `timeline.json` beside the history: open it in chrome://tracing or
    ui.perfetto.dev. Slows the training a little."""

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.warmup_epochs > self.epochs:
            raise ValueError("warmup_epochs must not exceed epochs")
        if self.backend == "ddp":
            if self.horovod != Horovod():
                raise ValueError("horovod: these settings have no effect with backend: ddp; leave them out")
            if self.timeline:
                raise ValueError("timeline: Horovod records it; say backend: horovod")
        if self.horovod.adasum and self.compression == "bf16":
            raise ValueError("compression: adasum does not go with bf16; say fp16 or none")
        return self
