"""Read masked autoencoder checkpoints, files and directories, into models, without running anything in them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..._checks import axes
from ...models.masked_autoencoder import MaskedAutoencoder
from ...models.published import system_of
from ...models.video import VideoMAE
from . import encoders, files, huggingface, lightly, videomae, vit_names
from .grids import Grid, find_grid, resize
from .systems import find_system, settings_of_content
from .weights import Weights, assemble, logger, patterns, settings_of_weights


def load(
    path: str | os.PathLike[str],
    *,
    allow_missing: str | Iterable[str] = (),
    allow_leftover: str | Iterable[str] = (),
    grid_size: tuple[int, int] | None = None,
    key: str | None = None,
    **settings: Any,
) -> MaskedAutoencoder:
    """Load a checkpoint of facebookresearch/mae, Hugging Face, timm, lightly, fastmim, or of a system by name.

    The result is of the class of the system, which the names and shapes of the tensors tell: `VideoMAE` (VideoMAE V2
    and Hugging Face's VideoMAE, too), `CrossMAE`, `CroCo` (v2, too), `CropMAE`, `Pixio` or `SimMIM`, by the names of
    their published code or of fastmim; others are a `MaskedAutoencoderViT`.

    Reads `.pth`, `.pt`, `.bin` and `.ckpt` files of PyTorch, `.safetensors` files, and directories that Hugging Face or
    timm wrote, shards included. Nothing in a file is run: PyTorch files are read with `weights_only`, which allows
    tensors, plain values and the `argparse.Namespace` of facebookresearch/mae's training checkpoints.

    The encoder is found by the names of its tensors, inside any nesting ("model", "state_dict", DeepSpeed's "module")
    and after any prefix ("model.", "backbone.", "net."); wrappers in names (`module.`, `_orig_mod.`) are removed. If a
    file holds several encoders, such as a teacher or averaged weights, the error lists them and `key` chooses one.

    Sizes are read from the tensors, or from Hugging Face's config.json. The numbers of heads are in no tensor. They are
    taken from the config, else from the published models of the same width (192: 3, 384: 6, 768: 12, 1024: 16,
    1280: 16; decoder 192: 6, 256: 8, 512: 16, of CroCo 768: 12; of videos 1408: 16, and decoder 192: 3, 384: 6, 512: 8,
    640: 8), else they must be given; those of SimMIM are in its tensors. The size of videos is that of the config, else
    16 frames of 224 by 224. `norm_pix_loss` is taken from the config or the training arguments, else it is the default
    of the system, of `MaskedAutoencoderViT` False; the eps of the norms from the config, else 1e-6. Of lightly's
    models, those built on timm are read, with the attribute names of its examples: backbone, decoder, decoder_embed,
    prediction_head.

    The logger "fastmim.interop" warns of everything that is assumed, initialised anew, converted to another dtype or
    not finite; numbers of heads that follow from the width are logged as information.

    The published weights of facebookresearch/mae, facebook/vit-mae-* and timm's vit_*.mae are CC-BY-NC-4.0, for
    non-commercial use only, however they are loaded.

    Args:
        path: a file or a directory.
        allow_missing: names, or shell patterns of names, that the checkpoint may lack; they are initialised anew.
            "decoder" stands for the whole decoder, which files of an encoder alone lack (facebookresearch/mae's
            mae_pretrain_*, timm's). Default: none.
        allow_leftover: names or patterns that the checkpoint may have beyond the model's, such as "head.*"; they are
            ignored. Names are without the prefix of the encoder's names; names without that prefix
            ("criterion.weight" beside "model.*") are as in the file. Default: none.
        grid_size: (rows, columns) of the checkpoint's position table. Default: that of the config; else the grid whose
            sine-cosine table it is; else that of `img_size`, if it has as many patches; else a square. None of videos.
        key: name of the part of the file that holds the encoder, as the error about several lists it ("teacher",
            "model_ema"); the rest of the file is ignored. Default: the whole file.
        settings: constructor arguments of the class, in place of those read. With an `img_size` of another grid, the
            position tables of encoder and decoder are interpolated in 2-D: bicubic without antialiasing, as in
            facebookresearch/mae. Those of videos are in no published file, and are computed; SimMIM's relative
            positions are of one grid.

    Returns:
        The model, on the CPU, in the dtype of the file; for several dtypes, in one that holds all their values.

    Raises:
        FileNotFoundError: `path` does not exist, or is a directory without weights.
        ImportError: the file is .safetensors and safetensors is not installed.
        TypeError: `settings` that the constructor does not take; arguments of a wrong type.
        ValueError: a damaged file, a file that would run code, or one of another kind; several encoders and no `key`;
            names missing or left over, other shapes or dtypes (all are listed); numbers of heads or a grid that the
            checkpoint does not give; a grid that contradicts the position tables.
    """
    path = Path(path)
    source = str(path)
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key must be the name of a part of the file, got {key!r}")
    given_grid = None
    if grid_size is not None:
        rows, columns = axes("grid_size", grid_size, 2)
        given_grid = "grid_size", (rows, columns)
    missing, leftover = patterns("allow_missing", allow_missing), patterns("allow_leftover", allow_leftover)
    file = files.locate(path)
    content = files.read(file)
    tensors, outside = encoders.tensors(encoders.choose(content, key, source), key, leftover, source)
    weights = _rename(tensors, source)
    system = find_system(weights, source)
    weights = system.kind._published(weights)
    found = settings_of_weights(weights, source) | system.settings(weights)
    patch, video = found["patch_size"], system.kind is VideoMAE
    if video and grid_size is not None:
        raise ValueError(f"grid_size is of images, but {source} is of videos: pass img_size, got grid_size {grid_size}")
    config = file.parent / "config.json"
    theirs = any(name.endswith(vit_names.PATCHES) for name in tensors)
    if theirs and config.is_file():
        found |= _settings_of_config(config, video)
        if not video:
            given_grid = given_grid or (f"image_size of {config}", _grid("image_size", found["img_size"], patch))
    elif not video:
        found |= settings_of_content(content, source)
    if not video:
        new_grid = None if settings.get("img_size") is None else _grid("img_size", settings["img_size"], patch)
        prefix = found.get("num_prefix_tokens", int("cls_token" in weights))
        grid = find_grid(weights, source, given_grid, new_grid, prefix)
        if grid is not None:
            found["img_size"] = grid[0] * patch[0], grid[1] * patch[1]
            resize(weights, grid, new_grid or grid, prefix)
    found |= settings
    names = [("num_heads", found["embed_dim"], system.heads)]
    if system.decoder_width is not None:
        width = found.get("decoder_embed_dim", system.decoder_width)
        names.append(("decoder_num_heads", width, system.decoder_heads))
    for name, width, standard in names:
        if name in found:
            continue
        if width not in standard:
            raise ValueError(f"{path} does not give {name}, and no published model has width {width}: pass {name}=")
        found[name] = standard[width]
        logger.info("%s: %s is assumed to be %d, as in published models of width %d", path, name, found[name], width)
    model: MaskedAutoencoder
    if video:
        eps = huggingface.HEAD_NORM_EPS if theirs and "norm_layer" not in settings else None
        model = videomae.assemble_video(weights, found, source, missing, leftover, outside, norm_eps=eps)
    else:
        model = assemble(weights, found, source, missing, leftover, outside, kind=system.kind)
    if "img_size" not in found:
        size = " by ".join(map(str, model.img_size))
        logger.warning("%s has no position table: image size %s is assumed; pass img_size= if not", path, size)
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        logger.warning("%s has NaN or infinite values in %s", path, ", ".join(broken))
    return model


def _rename(weights: Weights, source: str) -> Weights:
    """Give the tensors of any known library fastmim's names."""
    if videomae.is_named(weights):
        return videomae.rename(weights, source)
    if "patch_embed.proj.weight" in weights or system_of(weights) is not None:
        return weights
    if lightly.is_named(weights):
        return lightly.rename(weights, source)
    return vit_names.rename(weights, source)


def _settings_of_config(path: Path, video: bool) -> dict[str, Any]:
    """Return the settings in a config.json of images or videos."""
    config = files.read_json(path)
    kind = config.get("model_type")
    if video:
        if kind != "videomae":
            raise ValueError(f"{path} must be of model_type videomae, got {kind!r}")
        return huggingface.settings_of_video_config(config, str(path))
    if kind == "pixio":
        return huggingface.settings_of_pixio_config(config, str(path))
    if kind not in ("vit_mae", "vit"):
        raise ValueError(f"{path} must be of model_type vit_mae (or vit or pixio, an encoder), got {kind!r}")
    return huggingface.settings_of_config(config, str(path))


def _grid(name: str, image: object, patch: tuple[int, int]) -> Grid:
    """Return the grid of patches of an image size; `name` is the argument for errors."""
    rows, columns = (size // side for size, side in zip(axes(name, image, 2), patch))
    return rows, columns
