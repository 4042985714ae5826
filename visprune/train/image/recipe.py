# SPDX-License-Identifier: Apache-2.0
"""Recipes of image classification: what the YAML of a run may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "FREE_ON_RESUME",
    "AugmentConfig",
    "DataConfig",
    "DistillConfig",
    "EmaConfig",
    "ImageRecipe",
    "ModelConfig",
    "OptimizerConfig",
    "PruneConfig",
    "ScheduleConfig",
    "SparseConfig",
]

# What may differ between a run and its resumption. Everything else would make a run that is neither
# the one nor the other.
FREE_ON_RESUME = ("device", "threads", "data.workers", "save_every", "log_every", "schedule.epochs")


@dataclass
class DataConfig:
    """Where the pictures are; see :func:`visprune.train.image.sources.open_pictures`.

    Attributes:
        path: Folder, ``.zip`` or ``.tar`` of class folders, folder of ``.npz`` or ``.parquet``
            files, data set saved by `datasets`, or ``hf:NAME`` for one of the Hub.
        train: Sub-folder, file or split of the training pictures.
        val: The same of the validation pictures.
        train_limit: Use that many training pictures, drawn once by the recipe's seed.
        val_limit: The same for validation.
        image_key: Column of the picture (Hugging Face data sets), or None to find it by its type.
        label_key: Column of the label, or None to find it by its type.
        on_corrupt: ``refuse``: stop at a picture that cannot be read and name it. ``skip``: name it
            in the log and go on, with the next good picture in training, without it in validation.
        workers: Processes that read pictures; 0 reads them in this one.
    """

    path: str
    train: str = "train"
    val: str = "val"
    train_limit: int | None = None
    val_limit: int | None = None
    image_key: str | None = None
    label_key: str | None = None
    on_corrupt: str = "refuse"
    workers: int = 0


@dataclass
class ModelConfig:
    """The model.

    Attributes:
        name: Any name of ``timm.create_model``, ours among them.
        args: Its further arguments, such as ``img_size`` and ``patch_size``.
        cfg: Fields of timm's ``pretrained_cfg`` to replace: mean, std, crop_pct, interpolation
            (``input_size`` follows ``img_size``).
        pretrained: Load the weights that timm knows for it.
        start_from: Folder written by an earlier run (or in timm's Hub layout) whose weights it
            starts from; a head of another number of classes is left out.
        grad_checkpointing: Compute activations again in the backward pass instead of storing them.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    cfg: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    start_from: str | None = None
    grad_checkpointing: bool = False


@dataclass
class PruneConfig:
    """Token reduction while training, by :func:`visprune.prune`.

    Attributes:
        method: Name of the method.
        args: Its parameters.
        shrink_start: Epoch until which all tokens are kept (EViT, arXiv:2202.07800). It and the
            next apply to methods with a ``keep_ratio``.
        shrink_epochs: Epochs over which the ratio of kept tokens then falls to the method's, along
            a cosine; 0 starts with the method's own.
        ratio_weight: Weight of the loss that holds a learned predictor to its ratio
            (DynamicViT, arXiv:2106.02034).
        model_lr_scale: For such a predictor: the model's own weights learn at this multiple of the
            learning rate, the predictor at the whole. 0 leaves the model as it is; the official
            code of DynamicViT has 0.01.
    """

    method: str
    args: dict[str, Any] = field(default_factory=dict)
    shrink_start: float = 0.0
    shrink_epochs: float = 0.0
    ratio_weight: float = 2.0
    model_lr_scale: float = 1.0


@dataclass
class AugmentConfig:
    """How training pictures are varied, by timm.

    Attributes:
        transform: Arguments of ``timm.data.create_transform``: scale, ratio, hflip, color_jitter,
            auto_augment, re_prob ...
        mixup: Alpha of mixup; 0 is none. One mixing ratio for a whole batch.
        cutmix: Alpha of cutmix; 0 is none.
        mix_prob: Share of batches that are mixed.
        switch_prob: Share of mixed batches that get cutmix where both are on.
        smoothing: Label smoothing.
    """

    transform: dict[str, Any] = field(default_factory=dict)
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.0


@dataclass
class OptimizerConfig:
    """The optimiser, by ``timm.optim.create_optimizer_v2``.

    Attributes:
        name: A name of ``timm.optim.list_optimizers()``.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices.
        layer_decay: Factor of the learning rate from each layer to the one below.
        clip_grad: Largest norm of the gradient, or None.
        args: Further arguments.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """The learning rate, by ``timm.scheduler.create_scheduler_v2``, set at every step.

    Attributes:
        name: ``cosine``, ``tanh``, ``step``, ``multistep``, ``poly`` (newer timm: ``wsd`` ...).
        epochs: Length of the run.
        warmup_epochs: Of them, epochs of linear warm-up.
        warmup_lr: Rate at its start.
        min_lr: Rate at the end.
        args: Further arguments.
    """

    name: str = "cosine"
    epochs: float = 10
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class EmaConfig:
    """Moving average of the weights, by timm's ``ModelEmaV3``.

    Attributes:
        decay: Share of the old average in the new one.
        warmup: Average over a shorter past at the beginning.
    """

    decay: float = 0.9998
    warmup: bool = True


@dataclass
class DistillConfig:
    """Learning from a teacher, such as the dense model.

    Attributes:
        teacher: Folder of its weights, or a name of timm (then with its pretrained weights).
        logit: Weight of KL(teacher || student) on the class logits.
        token: Weight of the mean squared difference of the last patch tokens, at the places that
            the student still has.
        temperature: Both sides' logits are divided by it, the loss multiplied by its square.
        hard_weight: Weight of the loss on the labels.
    """

    teacher: str
    logit: float = 0.5
    token: float = 0.0
    temperature: float = 1.0
    hard_weight: float = 1.0


@dataclass
class SparseConfig:
    """Sparsifiner's two stages (arXiv:2303.13755); the section ``distill`` names the teacher.

    Attributes:
        recon_epochs: Epochs in which the predictors alone learn to reconstruct the teacher's
            attention. After them the rest learns under their mask (predictors too, where the
            model's ``mask_gradient`` is ``straight_through``).
        recon_weight: Weight of that loss: squared error, summed over a layer's entries, mean over
            layers and pictures. The official code sums over the 168 pictures of a GPU as well, with
            weight 0.01.
        recon_lr: Constant rate of that stage, or None for the schedule's (officially 3e-4 falling
            to 2e-4).
    """

    recon_epochs: float = 5
    recon_weight: float = 1.68
    recon_lr: float | None = 3e-4


@dataclass
class ImageRecipe:
    """A whole run.

    Attributes:
        data: See :class:`DataConfig`, and so on for the sections below.
        task: ``image_classification``.
        batch: Pictures per step, over all processes.
        micro_batch: Pictures that go through the model at once. None: ``batch`` divided by the
            number of processes. Random numbers inside the model (drop path, dropout, Gumbel noise)
            are drawn per micro-batch, so runs on different numbers of processes are the same run
            if this is the same. It must be even where batches are mixed.
        seed: Seed of weights, order and augmentation.
        device: ``auto`` (CUDA if there is one), or a torch device.
        precision: ``fp32`` or ``bf16`` (autocast; weights and optimiser stay fp32).
        threads: CPU threads, or None for torch's choice.
        save_every: Steps between checkpoints.
        log_every: Steps between lines of the log.
        validate_every: Epochs between validations; the last epoch always ends with one.
    """

    data: DataConfig
    model: ModelConfig
    task: str = "image_classification"
    prune: PruneConfig | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig | None = None
    distill: DistillConfig | None = None
    sparse: SparseConfig | None = None
    batch: int = 128
    micro_batch: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    threads: int | None = None
    save_every: int = 200
    log_every: int = 20
    validate_every: int = 1
