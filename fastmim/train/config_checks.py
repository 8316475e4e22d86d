"""Checks of the settings of a run, all made before anything starts."""

import math
import re
from typing import TYPE_CHECKING

import torch

from .._checks import check_count, check_number, check_ratio
from ..models.masked_autoencoder import MaskedAutoencoder
from ..models.video import VideoMAE
from .masks import Masks
from .objective import NAMES
from .registry import takes_pairs
from .report.reporter import check_name
from .values import PATHS, ConfigError, imported, one_of

if TYPE_CHECKING:
    from .config import Config


def check_config(config: "Config") -> MaskedAutoencoder:
    """Check the settings; return the model that they describe, without values.

    Raises:
        TypeError, ValueError: a value out of range, or settings that contradict each other.
    """
    one_of("device", config.device, ("auto", "cpu", "cuda"))
    one_of("parallel", config.parallel, ("auto", "ddp", "fsdp"))
    one_of("backend", config.backend, ("auto", "dali", "pillow", "simplejpeg", "pyav", "torchcodec"))
    if not isinstance(config.cuda_graphs, bool) and config.cuda_graphs != "auto":
        raise ConfigError(f'cuda_graphs must be "auto", true or false, got {config.cuda_graphs!r}')
    if config.compile and config.cuda_graphs is True and config.micro_batch_size is not None:
        # a replay writes to the memory in which the one before it left its gradients
        raise ConfigError(
            "micro_batch_size must be none with compile and cuda_graphs, which take a batch whole; "
            f"got {config.micro_batch_size}"
        )
    if config.cuda_graphs is True and config.parallel == "fsdp":
        # FSDP gathers weights into other memory than that of the captured graph
        raise ConfigError("parallel must be auto or ddp with cuda_graphs, which know weights by address; got fsdp")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device must be auto or cpu where torch finds no CUDA device, got cuda")
    if config.cuda_graphs is True and config.device != "cuda":
        raise ConfigError(f"cuda_graphs needs device cuda, got {config.device}")
    check_count("seed", config.seed, 0, 2**63 - 1)
    for name in ("in_chans", "batch_size", "epochs", "checkpoint_every", "log_every", "max_skipped"):
        check_count(name, getattr(config, name), 1)
    check_count("keep_last", config.keep_last, 2)  # with one to fall back to
    check_count("reconstruct_every", config.reconstruct_every, 0)
    for name in ("max_steps", "micro_batch_size", "keep_every", "num_threads"):
        if getattr(config, name) is not None:
            check_count(name, getattr(config, name), 1)
    check_ratio("mask_ratio", config.mask_ratio)
    check_ratio("decode_ratio", config.decode_ratio, one=True)
    for name in ("base_lr", "min_lr", "weight_decay", "warmup"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ConfigError(f"{name} must be finite and at least 0, got {getattr(config, name)}")
    for name in ("lost_after", "timeout"):
        if not 1 <= getattr(config, name) < 1e8:
            raise ConfigError(f"{name} must be at least 1 second and below 1e8, got {getattr(config, name)}")
    if config.warmup >= 1:
        raise ConfigError(f"warmup must be a share of the run in [0, 1), got {config.warmup}")
    if any(not config.warmup <= check_number("lr_drops", share) < 1 for share in config.lr_drops) or (
        sorted(set(config.lr_drops)) != config.lr_drops
    ):
        raise ConfigError(
            f"lr_drops must be ascending shares of the run from warmup, {config.warmup}, to 1; got {config.lr_drops}"
        )
    if config.clip_grad is not None and not 0 < config.clip_grad < math.inf:
        raise ConfigError(f"clip_grad must be positive and finite, or none, got {config.clip_grad}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ConfigError(f"betas must be in [0, 1), got {list(config.betas)}")
    if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
        raise ConfigError(f"crop_scale must be two ascending shares in (0, 1], got {list(config.crop_scale)}")
    for name in PATHS:
        if not getattr(config, name):
            raise ConfigError(f"{name} must be a path, got an empty one")
    model = _check_model(config)
    if config.objective not in NAMES:
        imported("objective", config.objective, NAMES)
    if config.objective == "mae" and config.objective_options:
        raise ConfigError(f"objective_options must be empty for objective mae, got {config.objective_options}")
    if config.report_to is not None:
        check_name(config.report_to)
    elif config.report_options:
        raise ConfigError(f"report_options must be empty without report_to, got {config.report_options}")
    if config.ema is not None and not 0 <= config.ema < 1:
        raise ConfigError(f"ema must be in [0, 1), or none, got {config.ema}")
    if not isinstance(config.patchwise, bool) and config.patchwise != "auto":
        raise ConfigError(f'patchwise must be "auto", true or false, got {config.patchwise!r}')
    return model


def _check_model(config: "Config") -> MaskedAutoencoder:
    """Check the settings of model, masks and views; return the model, without values."""
    sizes = (config.image_size,) if isinstance(config.image_size, int) else config.image_size
    if not isinstance(sizes, tuple) or not 1 <= len(sizes) <= 3:
        raise ConfigError(f"image_size must be an int or a list of 1 to 3, got {config.image_size!r}")
    for size in sizes:
        check_count("image_size", size, 1)
    if config.norm_pix_loss not in (True, False, "channel", "auto"):
        raise ConfigError(f'norm_pix_loss must be true, false, "channel" or "auto", got {config.norm_pix_loss!r}')
    for option, key in (("img_size", "image_size"), ("norm_pix_loss", "norm_pix_loss"), ("in_chans", "in_chans")):
        # earlier versions had in_chans among the options
        if option in config.model_options and (option, config.model_options[option]) != ("in_chans", config.in_chans):
            raise ConfigError(f"model_options must not hold {option}: {key} is a key of its own")
    if "norm_layer" in config.model_options:
        raise ConfigError("model_options must not hold norm_layer, which no text can name")
    with torch.device("meta"):
        try:
            model = config.build()
        except TypeError as error:
            raise ConfigError(f"model_options: {error}") from None
        except ValueError as error:
            # the model's name for image_size
            raise ConfigError(re.sub(r"\bimg_size\b", "image_size", str(error))) from None
    if isinstance(model, VideoMAE) and isinstance(config.image_size, int):
        raise ConfigError(
            f"image_size must be [frames, height, width] for model {config.model}, got {config.image_size}"
        )
    values, made = model.in_chans * math.prod(model.patch_size), model.decoder_pred.out_features
    if made != values and (config.objective == "mae" or config.objective_options.get("own")):
        raise ConfigError(
            f"model_options.out_dim must be {values}, the values of a patch, which are scored; got {made}"
        )
    masks = Masks(config.mask_settings, model.grid_size)
    scored = config.objective == "mae" and config.data_options.get("covisible")
    if masks.ranks and config.objective in ("mae", "distill") and not scored:
        raise ConfigError(
            f"mask of kind {masks.kind!r} needs an objective with scores(batch), a class of your own, or mae with "
            f"data_options.covisible; got objective {config.objective}"
        )
    if config.inner is not None:
        if not 0 < config.inner[0] <= config.inner[1] <= 1:
            raise ConfigError(f"inner must be two ascending shares in (0, 1], got {list(config.inner)}")
        if config.objective in ("mae", "distill") and not takes_pairs(model):
            raise ConfigError(f"inner must be none for model {config.model}, which takes one view")
    if config.objective == "distill" and takes_pairs(model):
        raise ConfigError(f"objective must not be distill for model {config.model}, which takes two views")
    return model
