"""Settings of a run, read from a TOML file and `key=value`, and all checked before anything starts."""

import codecs
import dataclasses
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._checks import check_count, check_ratio
from ..models import mae
from .masks import Masks
from .objective import imported

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "configs"
MODELS = {
    **{
        f"mae_vit_{size}_patch16": getattr(mae, f"mae_vit_{size}_patch16")
        for size in ("tiny", "small", "base", "large")
    },
    "mae_vit_huge_patch14": mae.mae_vit_huge_patch14,
}
SHORT = {name.split("_")[2]: name for name in MODELS}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPE_WORDS = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}
# settings that must not change between a checkpoint and the run that continues from it
IDENTITY = (
    *("model", "model_options", "image_size", "norm_pix_loss", "seed", "batch_size", "dtype"),
    *("objective", "objective_options"),
    # settings of the loader, which may continue in the middle of an epoch
    *("crop_scale", "flip"),
)
PATHS = ("data", "output_dir")


class ConfigError(ValueError):
    """A setting that is wrong or can't be served, named by a message of one line."""


@dataclass(frozen=True)
class Config:
    """The settings of a pretraining run: the keys of a TOML file, and of `key=value` on the command line.

    In `data` and `output_dir` a leading `~` is the home folder; environment variables are not expanded.

    Args:
        data: a folder of images, a folder of packed shards, or "digits", the digits inside scikit-learn.
        output_dir: the folder of checkpoints, metrics and the final model. A run in a folder that has checkpoints
            continues from them; one process or job may use it at a time. Below `data` it is left out of the images.
        seed: seed of weights, order, crops and masks.
        model: "tiny", "small", "base", "large", "huge" or the full name of the model's function.
        model_options: arguments of `MaskedAutoencoderViT` that replace the model's own, such as patch_size.
        image_size: side of the square crops.
        norm_pix_loss: normalise the targets patch by patch.
        mask_ratio, decode_ratio: share of the patches that is removed, and share of the removed that is predicted; a
            decode_ratio below 1 is another objective.
        mask: another source of masks: `kind`, a function of `fastmim.masking` (random, cells, blocks, tube, weighted,
            hardest), and its options, which replace mask_ratio and decode_ratio. mask_ratio, decode_ratio and share may
            be [first, last], which change in proportion to the steps done. For "weighted" and "hardest" the objective
            scores the patches.
        objective: "mae", the model's own loss; "distill", `fastmim.train.Distill`; or "package.module:Class", a module
            made of (model, **objective_options) whose forward(batch, mask) returns the loss.
        objective_options: those of the objective; for "distill" `teacher` is the path of a checkpoint.
        ema: momentum of an average of the weights, which checkpoints hold beside them; none: no average.
        crop_scale: least and largest share of a picture's area that a crop takes.
        flip: mirror half of the crops.
        backend, num_threads: decoder and threads of the loader.
        patchwise: true: the loader reads the patches that are kept or predicted, instead of whole images, with the same
            results; not with a mask that changes or ranks patches, an objective that sees all patches, or
            reconstruct_every. An objective of your own is given `fastmim.Patches`. "auto": where it reads less, from
            packed shards, for the objectives "mae" and "distill".
        batch_size: images of one update, over all processes.
        micro_batch_size: most images that a process takes at once; the gradients of larger batches are accumulated.
        epochs, max_steps: length of the run; max_steps overrides epochs.
        base_lr, min_lr: the peak is base_lr * batch_size / 256; min_lr is absolute.
        warmup: share of the run in which the learning rate rises.
        weight_decay, betas: AdamW's; biases and norms don't decay.
        clip_grad: largest norm of the gradient; none: no clipping.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "bfloat16" (by autocast, weights in float32), "float32", "float64".
        parallel: "auto", "ddp" or "fsdp"; auto shards the huge model.
        compile, checkpoint_activations: how a step runs.
        cuda_graphs: replay the whole step, as the kernels that it runs otherwise, from a CUDA graph. With `compile` the
            compiled passes are replayed instead, and micro_batch_size must be none. Several processes need `compile`;
            sharded parameters are refused.
        checkpoint_every: steps between checkpoints.
        keep_last, keep_every: checkpoints that are kept: the last `keep_last`, and those of every `keep_every` steps.
        log_every: steps between lines of metrics.
        reconstruct_every: steps between pictures of reconstructions; 0: none.
        max_skipped: consecutive updates without a finite loss and gradient after which the run goes back to the last
            checkpoint, and the second time stops.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    data: str
    output_dir: str
    seed: int = 0
    model: str = "mae_vit_base_patch16"
    model_options: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    norm_pix_loss: bool = True
    mask_ratio: float = 0.75
    decode_ratio: float = 1.0
    mask: dict[str, Any] = field(default_factory=dict)
    objective: str = "mae"
    objective_options: dict[str, Any] = field(default_factory=dict)
    ema: float | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    backend: str = "auto"
    num_threads: int | None = None
    patchwise: bool | str = "auto"
    batch_size: int = 4096
    micro_batch_size: int | None = None
    epochs: int = 800
    max_steps: int | None = None
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    parallel: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    checkpoint_activations: bool = False
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    log_every: int = 10
    reconstruct_every: int = 0
    max_skipped: int = 5

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(Config).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        for name in PATHS:
            object.__setattr__(self, name, _expanded(name, getattr(self, name)))
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
            self._check()
        except (TypeError, ValueError) as error:
            raise ConfigError(" ".join(str(error).split())) from None

    def _check(self) -> None:
        _one_of("model", self.model, (*SHORT, *MODELS))
        _one_of("dtype", self.dtype, ("auto", *DTYPES, *DTYPE_WORDS))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("parallel", self.parallel, ("auto", "ddp", "fsdp"))
        _one_of("backend", self.backend, ("auto", "dali", "pillow", "simplejpeg"))
        if self.compile and self.cuda_graphs and self.micro_batch_size is not None:
            # a replay writes to the memory in which the one before it left its gradients
            raise ConfigError(
                "micro_batch_size must be none with compile and cuda_graphs, which take a batch whole; "
                f"got {self.micro_batch_size}"
            )
        if self.cuda_graphs and self.parallel == "fsdp":
            # FSDP gathers weights into other memory than that of the captured graph
            raise ConfigError("parallel must be auto or ddp with cuda_graphs, which know weights by address; got fsdp")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device must be auto or cpu where torch finds no CUDA device, got cuda")
        if self.cuda_graphs and self.device != "cuda":
            raise ConfigError(f"cuda_graphs needs device cuda, got {self.device}")
        check_count("seed", self.seed, 0, 2**63 - 1)
        for name in ("image_size", "batch_size", "epochs", "checkpoint_every", "log_every", "max_skipped"):
            check_count(name, getattr(self, name), 1)
        check_count("keep_last", self.keep_last, 2)  # with one to fall back to
        check_count("reconstruct_every", self.reconstruct_every, 0)
        for name in ("max_steps", "micro_batch_size", "keep_every", "num_threads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        check_ratio("mask_ratio", self.mask_ratio)
        check_ratio("decode_ratio", self.decode_ratio, one=True)
        for name in ("base_lr", "min_lr", "weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if self.warmup >= 1:
            raise ConfigError(f"warmup must be a share of the run in [0, 1), got {self.warmup}")
        if self.clip_grad is not None and not 0 < self.clip_grad < math.inf:
            raise ConfigError(f"clip_grad must be positive and finite, or none, got {self.clip_grad}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {list(self.betas)}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale must be two ascending shares in (0, 1], got {list(self.crop_scale)}")
        for name in PATHS:
            if not getattr(self, name):
                raise ConfigError(f"{name} must be a path, got an empty one")
        for option, key in (("img_size", "image_size"), ("norm_pix_loss", "norm_pix_loss")):
            if option in self.model_options:
                raise ConfigError(f"model_options must not hold {option}: {key} is a key of its own")
        if "norm_layer" in self.model_options:
            raise ConfigError("model_options must not hold norm_layer, which no text can name")
        if self.model_options.get("in_chans", 3) != 3:
            raise ConfigError(
                f"model_options.in_chans must be 3, that of the loader; got {self.model_options['in_chans']}"
            )
        with torch.device("meta"):
            try:
                model = self.build()
            except TypeError as error:
                raise ConfigError(f"model_options: {error}") from None
            except ValueError as error:
                # the model's name for image_size
                raise ConfigError(re.sub(r"\bimg_size\b", "image_size", str(error))) from None
        masks = Masks(self.mask_settings, model.patch_embed.grid_size)
        if masks.ranks and self.objective in ("mae", "distill"):
            raise ConfigError(
                f"mask of kind {masks.kind!r} needs an objective with scores(batch), a class of your own; "
                f"got objective {self.objective}"
            )
        if self.objective not in ("mae", "distill"):
            imported(self.objective)
        if self.objective == "mae" and self.objective_options:
            raise ConfigError(f"objective_options must be empty for objective mae, got {self.objective_options}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be in [0, 1), or none, got {self.ema}")
        if not isinstance(self.patchwise, bool) and self.patchwise != "auto":
            raise ConfigError(f'patchwise must be "auto", true or false, got {self.patchwise!r}')

    @property
    def mask_settings(self) -> dict[str, Any]:
        """Return the settings of `fastmim.train.masks.Masks`."""
        return self.mask or {"kind": "random", "mask_ratio": self.mask_ratio, "decode_ratio": self.decode_ratio}

    def build(self) -> mae.MaskedAutoencoderViT:
        """Build the model; its weights are drawn from torch's generator."""
        options = {"img_size": self.image_size, "norm_pix_loss": self.norm_pix_loss, **self.model_options}
        model: mae.MaskedAutoencoderViT = MODELS[self.model](**options)
        return model

    @property
    def sharded(self) -> bool:
        """Return whether parameters are sharded over processes (FSDP2)."""
        return self.parallel == "fsdp" or (self.parallel == "auto" and self.model == "mae_vit_huge_patch14")

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

    Args:
        source: path of a TOML file, or name of a shipped config.
        overrides: settings as `key=value`; the last one of a key counts. The value of a text key, such as `output_dir`,
            is the text after the equals sign, or a string quoted as in TOML. Other values are TOML, or `none`.

    Raises:
        ConfigError: no such file, no TOML, or settings that can't be served.
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
            table[option] = _value(value)
        else:
            settings[name] = _text(value) if kinds.get(name) is str else _value(value)
    return Config.of(settings)


def shipped() -> list[str]:
    """Return the names of the configs that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def _value(text: str) -> Any:
    """Return the TOML value of a text; None for `none`; the text itself where it is not TOML."""
    text = text.strip()
    if text.lower() == "none":
        return None
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return value["value"] if value.keys() == {"value"} else text


def _text(text: str) -> str:
    """Return the text itself, without the quotes if it is a TOML string."""
    value = _value(text)
    return value if isinstance(value, str) else text.strip()


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`: an int may stand for a float, a list for a tuple, a path for a text."""
    optional = isinstance(kind, types.UnionType) and types.NoneType in kind.__args__
    if isinstance(kind, types.UnionType) and not optional:
        # one of several types, which _check knows
        return value
    if optional:
        if value is None:
            return None
        kind = kind.__args__[0]
    if name in PATHS and isinstance(value, os.PathLike):
        value = os.fspath(value)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_typed(name, part, argument) for part, argument in zip(value, arguments))
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        words = {
            tuple: f"a list of {len(arguments)} numbers",
            dict: "a table",
            bool: "true or false",
            str: "text (in TOML, in quotes)",
        }.get(origin, origin.__name__)
        got = f"{type(value).__name__} {value!r}"
        raise ConfigError(f"{name} must be {words}{' or none' if optional else ''}, got {got}")
    return value


def _expanded(name: str, path: str) -> str:
    """Return a path with `~` replaced by the home folder."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{name} {path} is in the home folder of no user; write ./{path} if ~ is part of the name")
    return expanded


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
