"""Settings that are fine alone and cannot work together, each refused with the reason.

Everything that can be known from the configuration is refused here, before a cluster is started.
Each message names the settings with their values, says why they do not work together, and names a
setting that helps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ganscale.config.methods import SemiSupervisedMethod
from ganscale.config.schedule import Schedule
from ganscale.config.sections import AugmentConfig

if TYPE_CHECKING:
    from ganscale.config.run import Config

_ENCODER_METHODS = ("vae", "vae-gan", "encoder", "bigan")


def impossible(config: Config) -> Iterator[str]:
    """What cannot work, each in one line that says what to set instead."""
    yield from _lengths(config)
    yield from _models(config)
    yield from _methods(config)
    yield from _objectives(config)
    yield from _augmentation(config)
    yield from _evaluation(config)
    yield from _micro_batches(config)
    yield from _without_effect(config)


def _lengths(config: Config) -> Iterator[str]:
    training, launch = config.training, config.launch
    if launch.min_workers > launch.max_workers:
        yield f"launch.num_workers=[{launch.min_workers}, {launch.max_workers}] must be [min, max]"
    if training.batch_size < 2 * launch.max_workers:
        yield (
            f"training.batch_size={training.batch_size} is too small for "
            f"launch.num_workers={launch.max_workers}: give each worker at least 2 images"
        )
    if launch.min_workers < launch.max_workers and launch.backend == "inprocess":
        yield (
            f"launch.num_workers=[{launch.min_workers}, {launch.max_workers}] needs "
            "launch.backend=ray: a process here cannot start others"
        )
    if training.batch_size > 1000 * training.total_kimg:
        yield (
            f"training.total_kimg={training.total_kimg} is less than one batch of "
            f"{training.batch_size} images"
        )


def _models(config: Config) -> Iterator[str]:
    model = config.model
    labels = model.num_classes and config.method.name != "semi-supervised"
    if labels and not model.takes_labels:
        yield (
            f"model.num_classes={model.num_classes} asks for labels, which {model.name} does not "
            "take: set model.num_classes=0, or model.name=sngan"
        )
    doublings = model.resolution.bit_length() - 3  # of the resolution, from 4x4 on
    if model.name == "biggan" and model.z_dim % (doublings + 1):
        yield (
            f"model.z_dim={model.z_dim} cannot be split evenly into the {doublings + 1} parts "
            f"that biggan takes at resolution {model.resolution}: choose a multiple"
        )
    halvings = max(0, doublings - 3)  # of the width, above 32x32
    if model.name == "r3gan" and model.base_channels % (8 << halvings):
        yield (
            f"model.base_channels={model.base_channels} must be a multiple of {8 << halvings} for "
            f"r3gan at resolution {model.resolution}: its blocks have groups of 16 channels"
        )


def _methods(config: Config) -> Iterator[str]:
    name = config.method.name
    if name == "semi-supervised":
        yield from _semi_supervised(config)
    if name == "vae":
        yield from (
            f"method.name=vae has no discriminator: leave {field}" for field in _judged(config)
        )
    if name == "bigan" and config.model.num_classes:
        yield "method.name=bigan trains without labels: set model.num_classes=0"
    if name == "bigan" and config.objective.name in ("least_squares", "minimax"):
        yield (
            f"objective.name={config.objective.name} has no form in which the encoder learns too: "
            "set objective.name=nonsaturating for method.name=bigan"
        )
    if name != "gan" and config.training.shared_fakes:
        yield f"training.shared_fakes is for method.name=gan, not {name}: set it to false"


def _semi_supervised(config: Config) -> Iterator[str]:
    assert isinstance(config.method, SemiSupervisedMethod)
    labels, num_classes = config.method.labels, config.model.num_classes
    if num_classes < 2:
        yield "method.name=semi-supervised needs classes: set model.num_classes=10 for CIFAR-10"
    elif labels % num_classes:
        yield (
            f"method.labels={labels} cannot be as many of each of the {num_classes} classes: "
            f"choose a multiple of {num_classes}"
        )
    if config.model.name == "biggan":
        yield (
            "method.name=semi-supervised keeps labels from the generator, which biggan cannot do "
            "without: set model.name=sngan"
        )
    if config.objective.top_k != Schedule.constant(1.0):
        yield (
            "method.name=semi-supervised has no logits to choose the best by: leave objective.top_k"
        )


def _judged(config: Config) -> Iterator[str]:
    """Fields that are set and have no effect without a discriminator."""
    # Refused rather than ignored: who sets a penalty believes that it is trained with.
    for section in ("objective", "penalty", "augment"):
        if getattr(config, section) != type(getattr(config, section))():
            yield section
    if config.optimizer.lr_discriminator is not None:
        yield "optimizer.lr_discriminator"
    if config.optimizer.clip_weights is not None:
        yield "optimizer.clip_weights"
    if config.training.discriminator_steps != 1:
        yield "training.discriminator_steps"


def _objectives(config: Config) -> Iterator[str]:
    penalty, optimizer, method = config.penalty, config.optimizer, config.method.name
    # Two methods have a discriminator of their own, whatever the model is.
    has_spectral_norm = method == "bigan" or (
        method != "semi-supervised" and config.model.is_lipschitz
    )
    # Any of these bounds the slope of the discriminator in its input, which the dual form of the
    # Wasserstein distance requires (Arjovsky et al. 2017).
    smooth = (
        penalty.wgan_gp
        or penalty.gradient_normalisation
        or optimizer.clip_weights
        or has_spectral_norm
    )
    if config.objective.name == "wasserstein" and not smooth:
        another = "" if method == "semi-supervised" else ", or take model.name=sngan"
        yield (
            "objective.name=wasserstein needs a discriminator that cannot be steep: set "
            "penalty.wgan_gp=10, penalty.gradient_normalisation=true or "
            f"optimizer.clip_weights=0.01{another}"
        )
    # Its parameters are scaled where they are used, those of the mapping network by a hundredth and
    # less, and styles scale them once more: their own products say nothing of its filters.
    if penalty.orthogonal and config.model.name == "stylegan2":
        yield (
            f"penalty.orthogonal={penalty.orthogonal:g} has no meaning for model.name=stylegan2, "
            "whose weights are scaled at run time: set it to 0, or take model.name=biggan"
        )
    # Its rounding, divided by the step and squared, is added to the penalty.
    differences = any(name.endswith("finite_difference") for name in penalty.names)
    if differences and config.training.precision == "bf16":
        yield (
            "training.precision=bf16 is too coarse for the small difference of logits that "
            "penalty.form=finite_difference takes: set training.precision=fp16 or fp32, or "
            "penalty.form=gradient"
        )
    # The normalised logit contains a gradient already; a penalty differentiates it, and its
    # training once more.
    if penalty.gradient_normalisation and penalty.gradient_names:
        yield (
            f"penalty.gradient_normalisation together with penalty.{penalty.gradient_names[0]} "
            "would need third derivatives: use one of them"
        )


def _augmentation(config: Config) -> Iterator[str]:
    augment = config.augment
    if augment.target is not None and not augment.p.is_constant:
        yield (
            f"augment.p is a schedule, but with augment.target={augment.target:g} it is adapted: "
            "set augment.p=0, where it starts, or augment.target=null"
        )
    if augment.name == "none" and (augment.target is not None or not augment.p.is_zero):
        yield "augment.p and augment.target need transforms: set augment.name=ada"
    if augment.name != "none" and augment.target is None and augment.p.is_zero:
        yield (
            f"augment.name={augment.name} does nothing while augment.p=0: set augment.p=1 for "
            "diffaugment, or augment.target=0.6 for an adaptive ada"
        )


def _evaluation(config: Config) -> Iterator[str]:
    checkpoint, evaluation = config.checkpoint, config.evaluation
    # Else no checkpoint would ever have a value, and none would be kept as the best.
    measured = evaluation.every_kimg > 0 and "fid" in evaluation.metrics
    if checkpoint.best_metric == "fid" and not measured:
        yield (
            "checkpoint.best_metric=fid needs evaluations: set evaluation.every_kimg, with "
            "fid among evaluation.metrics"
        )


def _without_effect(config: Config) -> Iterator[str]:
    """Settings that are set to something, and would do nothing."""
    data, guard, checkpoint = config.data, config.guard, config.checkpoint
    augment, halflives = config.augment, config.training.extra_ema_halflives_kimg
    if data.cache_limit_gb is not None and data.cache_dir is None:
        yield (
            f"data.cache_limit_gb={data.cache_limit_gb:g} limits data.cache_dir: set this as well, "
            "or leave both null"
        )
    if guard.rollback_lr_factor != 1 and guard.policy != "rollback":
        yield (
            f"guard.rollback_lr_factor={guard.rollback_lr_factor:g} is for guard.policy=rollback, "
            f"not {guard.policy}: set it to 1"
        )
    if augment.adapt_kimg != AugmentConfig().adapt_kimg and augment.target is None:
        yield (
            f"augment.adapt_kimg={augment.adapt_kimg:g} is how fast p comes to augment.target: set "
            "this as well, such as augment.target=0.6, or leave both out"
        )
    # Averages are called after their half-lives, and of two with one name one would be lost.
    if len({f"{kimg:g}" for kimg in halflives}) < len(halflives):
        yield (
            f"training.extra_ema_halflives_kimg={list(halflives)} has half-lives that are alike to "
            "six digits, which are one average: leave one of them out"
        )
    # One image has no diversity, so no checkpoint would ever be among the best.
    by_diversity = checkpoint.keep_best and checkpoint.best_metric == "metrics/diversity"
    if by_diversity and config.samples.num_images == 1:
        yield (
            f"checkpoint.keep_best={checkpoint.keep_best} with "
            "checkpoint.best_metric=metrics/diversity needs two images to compare: set "
            "samples.num_images=64, or checkpoint.best_metric=fid"
        )


def _micro_batches(config: Config) -> Iterator[str]:
    """What makes one sample's loss depend on the others of its batch, which parts do not see."""
    size, model, method = config.training.micro_batch_size, config.model, config.method.name
    if size is None:
        return
    setting = f"training.micro_batch_size={size}"
    # All of these are taken over the global batch, so more workers change no result.
    whole = "leave it null, and take more workers (launch.num_workers) if memory is short"
    if model.has_batch_statistics:
        yield (
            f"{setting} would change what model.name={model.name} learns, whose batch norm takes "
            f"its statistics from the whole batch: {whole}, or set model.name=r3gan"
        )
    if method in _ENCODER_METHODS:
        yield (
            f"{setting} would change what method.name={method} learns, since the batch norm of "
            f"encoders takes its statistics from the whole batch: {whole}"
        )
    # The discriminators of other methods are made without it.
    if model.has_minibatch_std and method == "gan":
        yield (
            f"{setting} would change what model.name={model.name} learns, whose discriminator "
            f"looks at the deviation of the whole batch: {whole}, or set model.name=r3gan"
        )
    if config.objective.name == "relativistic_average":
        yield (
            f"{setting} cannot be with objective.name=relativistic_average, which compares with "
            f"the mean of the whole batch: set objective.name=relativistic, or {whole}"
        )
    if config.objective.top_k != Schedule.constant(1.0):
        yield (
            f"{setting} cannot be with objective.top_k, which chooses from the whole batch: leave "
            f"objective.top_k, or {whole}"
        )
    if config.training.shared_fakes:
        yield (
            f"{setting} saves no memory with training.shared_fakes=true, which keeps the "
            "generator's forward of the whole batch: set training.shared_fakes=false"
        )
