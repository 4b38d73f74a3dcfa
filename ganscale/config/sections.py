"""All sections of a configuration except `model` and `method`: their fields, bounds and defaults.

The sentence below a field is its documentation. Bounds of single values are here; combinations that
cannot work are in `combinations`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from ganscale.config.schedule import Schedule, within
from ganscale.config.section import Section

ExtractorName = Literal["auto", "inception-v3", "efficientnet-lite0", "dinov2", "clip"]
MetricName = Literal[
    "fid",
    "fid_infinity",
    "kid",
    "inception_score",
    "prdc",
    "authenticity",
    "fid_per_class",
    "c2st_1nn",
]

RENAMED_METRICS = {
    "frechet": "fid",
    "frechet_infinity": "fid_infinity",
    "kernel": "kid",
    "neighbourhood": "prdc",
    "frechet_per_class": "fid_per_class",
}
"""Former names of metrics, which the files of old runs and sweeps may have, and the new ones."""


def refuse_old_metric(value: object) -> object:
    """The value. Raises `ValueError` with the new name if it is the former name of a metric."""
    # Not translated silently: results of other runs, to which these are compared, have the new
    # name.
    if isinstance(value, str) and value in RENAMED_METRICS:
        raise ValueError(f"this metric is now called {RENAMED_METRICS[value]}")
    return value


def valid_wandb_project(name: str) -> str:
    """The name of a W&B project; raises `ValueError` for one that wandb would refuse."""
    if not 1 <= len(name) <= 128 or set(name) & set("/\\#?%:\r\n"):
        raise ValueError(
            "a W&B project has 1 to 128 characters, and none of / \\ # ? % : or line breaks"
        )
    return name


class DataConfig(Section):
    """Which images are trained on, in which order, and how they are read."""

    shards: str | None = None
    """Path or URL (s3://, gs://, az://, http://) of a shard set; null builds one from `source`."""
    source: str = "auto"
    """auto, cifar10, cifar100, procedural, spectrograms, or a path; used only to build missing
    shards."""
    shuffle_window: int = Field(1024, ge=1)
    """Samples of one stream that are shuffled together."""
    cache: Literal["auto", "none", "ram", "device"] = "auto"
    """Where decoded images are kept: auto is device or ram for sets that fit easily."""
    cache_dir: str | None = None
    """Local folder for a remote set's shards, shared by a node's workers; null reads ranges."""
    cache_limit_gb: float | None = Field(None, gt=0)
    """Gigabytes that may lie in cache_dir; the shards used longest ago are removed first."""
    on_error: Literal["fail", "skip"] = "fail"
    """At a damaged sample the run ends, or the sample is left out of its batch and counted."""
    reader_threads: int = Field(2, ge=1)
    """Batches that a worker reads at once."""
    prefetch_batches: int = Field(2, ge=0)
    """Batches that wait for the worker."""
    store_deadline_seconds: float = Field(300.0, gt=0)
    """How long requests to a remote store are retried before the run fails."""
    store_timeout_seconds: float = Field(30.0, gt=0)
    """How long one request (of at most eight megabytes) may take before it is retried."""


class ObjectiveConfig(Section):
    """The losses of the generator and the discriminator."""

    name: Literal[
        "nonsaturating",
        "minimax",
        "least_squares",
        "hinge",
        "wasserstein",
        "relativistic",
        "relativistic_average",
    ] = "nonsaturating"
    """minimax is the original, whose generator saturates; relativistic pairs real with fake."""
    top_k: Annotated[Schedule, within(0, 1, above=True)] = Schedule.constant(1.0)
    """Part of a batch's images, those with the highest logits, that the generator learns from."""


class PenaltyConfig(Section):
    """Weights of the terms that are added to the losses; 0 switches a term off."""

    r1: Annotated[Schedule, within(0)] = Schedule.constant(0.0)
    """gamma; the penalty is gamma / 2 times the squared gradient of D at real images."""
    r2: Annotated[Schedule, within(0)] = Schedule.constant(0.0)
    """The same at fake images."""
    form: Literal["gradient", "finite_difference"] = "gradient"
    """How r1 and r2 get the gradient: exactly, or from one more forward at noisy images."""
    wgan_gp: float = Field(0.0, ge=0)
    """Distance of the gradient's norm from 1 between real and fake images."""
    dragan: float = Field(0.0, ge=0)
    """The same around real images."""
    consistency: float = Field(0.0, ge=0)
    """Change of a real image's logit when it is flipped and shifted."""
    lecam: float = Field(0.0, ge=0)
    """Distance of logits from the running mean of the other side's."""
    orthogonal: float = Field(0.0, ge=0)
    """Correlation between different filters of a layer, in both networks."""
    interval: int = Field(1, ge=1)
    """Gradient penalties are taken at every so many steps, so many times as strongly."""
    gradient_normalisation: bool = False
    """Divide logits by the norm of their gradient plus their size, in both phases."""

    @property
    def names(self) -> tuple[str, ...]:
        """The penalties on logits that are on, now or later in their schedules."""
        suffix = "_finite_difference" if self.form == "finite_difference" else ""
        scheduled = [name + suffix for name in ("r1", "r2") if not getattr(self, name).is_zero]
        fixed = ("wgan_gp", "dragan", "consistency", "lecam")
        return (*scheduled, *(name for name in fixed if getattr(self, name)))

    @property
    def gradient_names(self) -> tuple[str, ...]:
        """Those of them that differentiate gradients of D."""
        return tuple(name for name in self.names if name in ("r1", "r2", "wgan_gp", "dragan"))

    @property
    def twice_differentiated(self) -> bool:
        """Whether gradients of gradients of D are taken."""
        return self.gradient_normalisation or bool(self.gradient_names)


class AugmentConfig(Section):
    """What is done to real and fake images before D sees them, differentiably."""

    name: Literal["none", "diffaugment", "ada", "r3gan"] = "none"
    """Set of transforms."""
    p: Annotated[Schedule, within(0, 1)] = Schedule.constant(0.0)
    """Probability of each transform; with a target, where the adaptive one starts."""
    target: float | None = Field(None, gt=-1, lt=1)
    """p is adapted until the mean sign of D at real images is this (ADA: 0.6); null keeps `p`."""
    adapt_kimg: float = Field(500.0, gt=0)
    """Thousands of images in which the adaptive p can go from 0 to 1."""


class OptimizerConfig(Section):
    """Adam, for the generator and the discriminator."""

    lr: Annotated[Schedule, within(0, above=True)] = Schedule.constant(2e-4)
    """Learning rate."""
    lr_discriminator: Annotated[Schedule, within(0, above=True)] | None = None
    """Learning rate of the discriminator; null is the same as `lr`."""
    beta1: float = Field(0.5, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: Annotated[Schedule, within(0, 0.999999)] = Schedule.constant(0.999)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of a network's gradient."""
    clip_value: float | None = Field(None, gt=0)
    """Largest magnitude of an element of a gradient."""
    clip_weights: float | None = Field(None, gt=0)
    """Largest magnitude of the discriminator's weights (Wasserstein GAN: 0.01)."""


def _on_or_off(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class TrainingConfig(Section):
    """Length of the run, batch size, precision and averaged weights."""

    batch_size: int = Field(128, ge=1)
    """Global batch: real images a step over all workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Most images of one forward and backward on a worker, whose gradients add up to those of the
    batch; null takes all of a worker's images at once."""
    total_kimg: float = Field(2500.0, gt=0)
    """Length of the run in thousands of real images."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is fp16 with gradient scaling on CUDA and fp32 on CPU."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    """Compile elementwise work into one kernel a pass. With auto where it pays, for R3GAN and
    StyleGAN2 on CUDA, with a warning if it cannot be; with on that ends the run."""
    cuda_graphs: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    """Capture steps on CUDA as graphs and replay them. With auto a step that cannot be captured is
    launched kernel by kernel, with a warning; with on it ends the run."""
    discriminator_steps: int = Field(1, ge=1)
    """Discriminator updates for each update of the generator; each takes a batch."""
    shared_fakes: bool = False
    """Update both networks from one batch of fakes, which saves a forward of the generator."""
    ema_halflife_kimg: Annotated[Schedule, within(0)] = Schedule.constant(10.0)
    """Half-life of the averaged generator's weights; 0 follows the generator at once."""
    extra_ema_halflives_kimg: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Further averages, each with its own snapshots."""


class CheckpointConfig(Section):
    """When checkpoints and snapshots are written, where, and how many are kept."""

    location: str | None = None
    """Path or URL (s3://, gs://, az://) for checkpoints of runs, each in NAME; null is the run's
    folder."""
    every_kimg: float = Field(50.0, gt=0)
    """Distance between checkpoints; one more is written at the beginning and at the end."""
    every_minutes: float = Field(15.0, gt=0)
    """Longest time between them, for models that are slow."""
    keep_last: int = Field(3, ge=2)
    """Checkpoints kept; an older one goes only after a newer one is durable."""
    keep_best: int = Field(0, ge=0)
    """Further ones kept: those with the best `best_metric`."""
    best_metric: Annotated[
        Literal["metrics/diversity", "fid"], BeforeValidator(refuse_old_metric)
    ] = "metrics/diversity"
    """The best have the highest diversity, or the lowest distance of the last evaluation."""
    max_staleness_minutes: float = Field(60.0, gt=0)
    """How long training continues while no checkpoint can be written; then the run ends."""
    snapshot_every_kimg: float = Field(250.0, gt=0)
    """Distance between snapshots (generators for inference); one more at the end."""


class EvaluationConfig(Section):
    """The averaged generator measured during training, by all workers together."""

    every_kimg: float = Field(0.0, ge=0)
    """Distance between evaluations, and one more at the end; 0 is none."""
    num_images: int = Field(10_000, ge=100)
    """Generated images, always of the same seeds."""
    metrics: tuple[Annotated[MetricName, BeforeValidator(refuse_old_metric)], ...] = (
        "fid",
        "kid",
        "prdc",
    )
    """What is measured; prdc is precision, recall, density and coverage."""
    extractor: ExtractorName = "auto"
    """Network of the features; auto is Inception where its weights are, else EfficientNet."""
    reference: str | None = None
    """Shard set or folder of real images; null compares with the training set."""


class GuardConfig(Section):
    """What happens when training goes wrong: collapse, a stuck network, non-finite losses."""

    policy: Literal["warn", "rollback", "stop"] = "warn"
    """Record it; continue from a healthy checkpoint with other latents; or end the run."""
    max_rollbacks: int = Field(3, ge=1)
    """Rollbacks of a run; the fault after them ends it."""
    rollback_lr_factor: float = Field(1.0, gt=0, le=1)
    """Learning rates are multiplied by this at each rollback."""


class SamplesConfig(Section):
    """The sample grids drawn during training, of the averaged generator."""

    every_kimg: float = Field(50.0, gt=0)
    """Distance between grids; one more at the end."""
    num_images: int = Field(64, ge=1, le=1024)
    """Images in a grid, always from the same latents."""


class TrackingConfig(Section):
    """Where metrics are sent. metrics.jsonl and events.jsonl are always written."""

    wandb: Annotated[
        Literal["auto", "online", "offline", "disabled"],
        BeforeValidator(lambda mode: "auto" if mode in (None, "") else mode),
    ] = "auto"
    """auto, or nothing, is WANDB_MODE, else online where an API key is known, else offline."""
    project: Annotated[str, AfterValidator(valid_wandb_project)] = "ganscale"
    """W&B project: 1 to 128 characters, none of which is one of `/ \\ # ? % :`."""
    log_every_kimg: float = Field(2.0, gt=0)
    """Distance between rows of metrics."""


class LaunchConfig(Section):
    """Where the workers run."""

    backend: Literal["ray", "inprocess"] = "ray"
    """ray starts DDP workers through Ray Train; inprocess trains right here (or under torchrun)."""
    num_workers: Annotated[int, Field(ge=1)] | tuple[PositiveInt, PositiveInt] = 1
    """DDP workers; [min, max] takes as many as the cluster has room for, now and later."""
    use_gpu: bool = False
    """One CUDA device a worker."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: int = Field(1, ge=1)
    """Threads of a worker's CPU kernels; all workers of a machine together should not have more
    than it has cores."""
    ray_address: str | None = None
    """Address of a running cluster; null uses RAY_ADDRESS, else starts Ray on this machine."""
    max_failures: int = Field(3, ge=-1)
    """Restarts after a fault without a checkpoint in between; -1 is without limit."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long a collective may wait for a silent worker before it counts as a fault."""
    stall_seconds: float = Field(120.0, gt=0)
    """A step that takes longer is reported: which worker it waits for, and at what."""
    grace_seconds: float = Field(60.0, gt=0)
    """Time to checkpoint and end after SIGTERM or Ctrl-C; then, or at a second one, at once."""

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run trains with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run trains with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
