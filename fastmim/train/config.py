"""Settings of a run, read from a TOML file and `key=value`, and all checked before anything starts."""

import codecs
import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.mae import MaskedAutoencoderViT
from ..models.masked_autoencoder import MaskedAutoencoder
from . import registry
from .config_checks import check_config
from .registry import MODELS, SHORT
from .values import PATHS, ConfigError, expanded, one_of, parsed, plain_text, tomllib, typed

SHIPPED = Path(__file__).parent / "configs"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPE_WORDS = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}
# settings that must not change between a checkpoint and the run that continues from it
IDENTITY = (
    *("model", "model_options", "image_size", "norm_pix_loss", "seed", "batch_size", "dtype"),
    *("objective", "objective_options"),
    # settings of the loader, which may continue in the middle of an epoch
    *("crop_scale", "flip", "in_chans", "inner"),
)


@dataclass(frozen=True)
class Config:
    """The settings of a pretraining run: the keys of a TOML file, and of `key=value` on the command line.

    In `data` and `output_dir` a leading `~` is the home folder; environment variables are not expanded.

    Args:
        data: "skimage_photos", photographs inside scikit-image; or what a loader of `fastmim.data` reads, chosen by
            `fastmim.train.data.kind_of`: images for `ImageLoader`, arrays of 1 to 3 axes for `ArrayLoader`, videos for
            `ClipLoader`.
        output_dir: the folder of checkpoints, metrics and the final model. A run in a folder that has checkpoints
            continues from them; one process or job may use it at a time. Below `data` it is left out of the images.
        seed: seed of weights, order, crops and masks.
        model: "tiny", "small", "base", "large", "huge" for `mae_vit_*`; the name of any model of fastmim, such as
            "crossmae_vit_base_patch16"; or the name of a class, such as "MaskedAutoencoder".
        model_options: arguments of the model's class that replace the model's own, such as patch_size.
        image_size: size of the crops along each axis, such as [16, 224, 224]; one int stands for all axes.
        in_chans: channels of the data: 3 for pictures.
        norm_pix_loss: normalise the targets patch by patch; "channel": each channel of them; "auto": as in the paper of
            the model, true for `mae_vit_*` and the classes MaskedAutoencoder and MaskedAutoencoderViT.
        mask_ratio, decode_ratio: share of the patches that is removed, and share of the removed that is predicted; a
            decode_ratio below 1 is another objective.
        mask: another source of masks: `kind`, a function of `fastmim.masking` (random, cells, blocks, tube, weighted,
            hardest), and its options, which replace mask_ratio and decode_ratio. mask_ratio, decode_ratio and share may
            be [first, last], which change in proportion to the steps done. For "weighted" and "hardest" the objective
            scores the patches, or `covisible` of `data_options`.
        objective: "mae", the model's own loss; "distill", `fastmim.train.Distill`; or "package.module:Class", a module
            made of (model, **objective_options) whose forward(batch, mask) returns the loss.
        objective_options: those of the objective; for "distill" `teacher` is the path of a checkpoint.
        ema: momentum of an average of the weights, which checkpoints hold beside them; none: no average.
        crop_scale: least and largest share of a picture's area that a crop takes; without use for arrays, and for
            videos, whose crops are VideoMAE's unless `data_options` has `scale`.
        flip: mirror half of the crops; without use for arrays, for which `data_options` names the axes, `flips`.
        inner: least and largest share of a crop's area that a second crop inside it takes, for models of two views.
        data_options: further arguments of the loader: ratio, repeats and color_jitter of `ImageLoader`; channels_last,
            key, sample_axis, flips, repeats, nodata, min_valid, mean and std of `ArrayLoader`; sampling_rate, scale,
            ratio and repeats of `ClipLoader`. For a list of pairs covisible: true: objective "mae" scores patches by
            the share of each that the first picture shows too.
        backend, num_threads: decoder and threads of the loader.
        patchwise: true: the loader reads the patches that are kept or predicted, instead of whole images, with the same
            results; not with a mask that changes or ranks patches, an objective that sees all patches, or
            reconstruct_every. An objective of your own is given `fastmim.Patches`. "auto": where it reads less, from
            packed shards, for the objectives "mae" and "distill".
        batch_size: images of one update, over all processes.
        micro_batch_size: most images that a process takes at once; the gradients of larger batches are accumulated.
        epochs, max_steps: length of the run; max_steps overrides epochs.
        base_lr, min_lr: the peak is base_lr * batch_size / 256; min_lr is absolute.
        lr_drops: ascending shares of the run at which the learning rate falls to a tenth; none: it falls along half a
            cosine.
        warmup: share of the run in which the learning rate rises.
        weight_decay, betas: AdamW's; biases and norms don't decay.
        clip_grad: largest norm of the gradient; none: no clipping.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "bfloat16" (by autocast, weights in float32), "float32", "float64".
        parallel: "auto", "ddp" or "fsdp"; auto shards the huge model.
        compile, checkpoint_activations: how a step runs.
        cuda_graphs: true: replay the whole step, as the kernels that it runs otherwise, from a CUDA graph. With
            `compile` the compiled passes are replayed instead, and micro_batch_size must be none. Several processes
            need `compile`; sharded parameters are refused. "auto": replay it where one process trains on a GPU, without
            `compile`, parallel = "fsdp", checkpoint_activations, dtype float64, a mask that changes, hooks, and an
            objective of your own.
        checkpoint_every: steps between checkpoints.
        keep_last, keep_every: checkpoints that are kept: the last `keep_last`, and those of every `keep_every` steps.
        log_every: steps between lines of metrics.
        reconstruct_every: steps between pictures of reconstructions; 0: none.
        report_to: the service to which each line of metrics is sent, too: "wandb" (Weights & Biases), "mlflow", or
            "package.module:Class", a `fastmim.train.Reporter`. Training neither waits for it nor stops with it. A run
            that continues is the same run there.
        report_options: arguments of that class: project, name, entity, group, job_type, tags, notes, mode and settings
            for "wandb"; tracking_uri, experiment_name, run_name and tags for "mlflow".
        max_skipped: consecutive updates without a finite loss and gradient after which the run goes back to the last
            checkpoint, and the second time stops.
        lost_after: seconds without a sign of life after which another process counts as lost, and all end.
        timeout: seconds that an exchange with other processes may take.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    data: str
    output_dir: str
    seed: int = 0
    model: str = "mae_vit_base_patch16"
    model_options: dict[str, Any] = field(default_factory=dict)
    image_size: int | tuple[int, ...] = 224
    in_chans: int = 3
    norm_pix_loss: bool | str = "auto"
    mask_ratio: float = 0.75
    decode_ratio: float = 1.0
    mask: dict[str, Any] = field(default_factory=dict)
    objective: str = "mae"
    objective_options: dict[str, Any] = field(default_factory=dict)
    ema: float | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    inner: tuple[float, float] | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    num_threads: int | None = None
    patchwise: bool | str = "auto"
    batch_size: int = 4096
    micro_batch_size: int | None = None
    epochs: int = 800
    max_steps: int | None = None
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    lr_drops: list[float] = field(default_factory=list)
    warmup: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    parallel: str = "auto"
    compile: bool = False
    cuda_graphs: bool | str = "auto"
    checkpoint_activations: bool = False
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    log_every: int = 10
    reconstruct_every: int = 0
    report_to: str | None = None
    report_options: dict[str, Any] = field(default_factory=dict)
    max_skipped: int = 5
    lost_after: float = 60.0
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(Config).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), kind))
        for name in PATHS:
            object.__setattr__(self, name, expanded(name, getattr(self, name)))
        replace = {
            "model": SHORT.get(self.model, self.model),
            "device": ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device,
        }
        replace["dtype"] = DTYPE_WORDS.get(self.dtype, self.dtype)
        if self.dtype == "auto":
            replace["dtype"] = "bfloat16" if replace["device"] == "cuda" else "float32"
        for name, value in replace.items():
            object.__setattr__(self, name, value)
        try:
            one_of("model", self.model, (*SHORT, *MODELS))
            one_of("dtype", self.dtype, ("auto", *DTYPES, *DTYPE_WORDS))
            model = check_config(self)
        except (TypeError, ValueError) as error:
            raise ConfigError(" ".join(str(error).split())) from None
        if self.norm_pix_loss == "auto":
            plain = type(model) in (MaskedAutoencoder, MaskedAutoencoderViT)
            object.__setattr__(self, "norm_pix_loss", plain or model.norm_pix_loss)

    @property
    def mask_settings(self) -> dict[str, Any]:
        """Return the settings of `fastmim.train.masks.Masks`."""
        return self.mask or {"kind": "random", "mask_ratio": self.mask_ratio, "decode_ratio": self.decode_ratio}

    def build(self) -> MaskedAutoencoder:
        """Build the model; its weights are drawn from torch's generator."""
        options = {"img_size": self.image_size, "in_chans": self.in_chans, **self.model_options}
        if self.norm_pix_loss != "auto":
            options["norm_pix_loss"] = self.norm_pix_loss
        return registry.build(self.model, options)

    @property
    def sharded(self) -> bool:
        """Return whether parameters are sharded over processes (FSDP2)."""
        return self.parallel == "fsdp" or (self.parallel == "auto" and bool(re.search("_(huge|giant)_", self.model)))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data that JSON can hold."""
        settings = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "Config":
        """Make a config of plain data.

        Raises:
            ConfigError: an unknown or missing key, or a value that the constructor refuses.
        """
        valid = [entry.name for entry in dataclasses.fields(Config)]
        for name in settings:
            if name not in valid:
                raise ConfigError(f"unknown key {name!r}; valid keys are {', '.join(valid)}")
        for name in ("data", "output_dir"):
            if name not in settings:
                raise ConfigError(f"{name} is missing: add {name}=PATH")
        return Config(**settings)


def read(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config from a TOML file, or a shipped one by its name, and replace what the overrides say.

    Args and errors are those of `read_settings`, and the errors of `Config.of`.
    """
    return Config.of(read_settings(source, overrides))


def read_settings(source: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read the settings of a config, of which only the form is checked.

    Args:
        source: path of a TOML file, or name of a shipped config.
        overrides: settings as `key=value`; the last one of a key counts. The value of a text key, such as `output_dir`,
            is the text after the equals sign, or a string quoted as in TOML. Other values are TOML, or `none`.

    Raises:
        ConfigError: no such file, no TOML, or overrides of another form.
    """
    path = Path(os.path.expanduser(source))
    if not path.is_file() and path.name == str(source):
        path = SHIPPED / f"{path.name}.toml"
    if not path.is_file():
        raise ConfigError(f"CONFIG must be a TOML file or one of {', '.join(shipped())}; got {str(source)!r}")
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ConfigError(f"{path} is UTF-16, and TOML is UTF-8: save it as UTF-8")
        settings = tomllib.loads(content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} can't be read as TOML: {error}") from None
    kinds = typing.get_type_hints(Config)
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"settings are given as key=value, got {text!r}")
        name, _, option = name.strip().partition(".")
        if option:
            table = settings.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name} is not a table, so {text!r} sets nothing")
            table[option] = parsed(value)
        else:
            settings[name] = plain_text(value) if kinds.get(name) is str else parsed(value)
    return settings


def shipped() -> list[str]:
    """Return the names of the configs that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))
