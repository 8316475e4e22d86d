"""The loader of a run, chosen by what its data hold."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..data import ArrayLoader, ClipLoader, ImageLoader
from ..data.array_formats import STORES
from ..data.array_formats import SUFFIXES as ARRAYS
from ..data.base_loader import Loader, TooFewImages
from ..data.clip_files import SUFFIXES as VIDEOS
from ..data.formats import readable_suffixes
from ..data.lock import NAME as LOCK
from ..data.packed import INDEX, read_json
from ..data.patch_shards import FORMAT as PATCHES
from ..data.stats import measured_of
from ..models.masked_autoencoder import MaskedAutoencoder
from . import photos
from .config import Config
from .distributed import Processes
from .masks import Masks
from .registry import takes_pairs
from .values import ConfigError

Kind = Literal["images", "arrays", "clips"]


def kind_of(source: Path, axes: int, in_chans: int) -> Kind:
    """Return the loader of a source: "images" for `ImageLoader`, "arrays" for `ArrayLoader`, "clips" for `ClipLoader`.

    The first file of the source, in the order of names, that a loader reads decides by its suffix. TIFF files, which
    two read, are images for a model of 3 channels on 2 axes, else arrays. What `fastmim pack` wrote is what was packed;
    tar files are images, and so are text files, which list pairs, but for a model of 3 axes, for which they list clips.

    Args:
        source: a file or a folder.
        axes, in_chans: axes and channels of the model's input.
    """
    like: Kind = "images" if (axes, in_chans) == (2, 3) else "arrays"
    if (source / INDEX).is_file():
        return _packed(source)
    suffixes = {"images": (*readable_suffixes(), ".tar"), "arrays": ARRAYS, "clips": VIDEOS}
    for name in _names(source):
        kinds: list[Any] = [kind for kind, ends in suffixes.items() if name.endswith(ends)]
        if kinds:
            found: Kind = like if len(kinds) > 1 else kinds[0]
            return found
    if source.is_file():
        return "clips" if axes == 3 else "images"
    return like


def _packed(source: Path) -> Kind:
    """Return the kind of what was packed."""
    index = read_json(source / INDEX)
    if index.get("format") != PATCHES:
        return "images"
    return "clips" if "frame_stride" in index.get("settings", {}) else "arrays"


def _holds_patches(source: Path, model: MaskedAutoencoder) -> bool:
    """Return whether patches of a model are read from a source without what is around them."""
    if not (source / INDEX).is_file():
        return False
    index = read_json(source / INDEX)
    return index.get("format") != PATCHES or index.get("patch_size") == list(model.patch_size)


def _names(source: Path) -> Iterator[str]:
    """Yield the names of files below a folder, but for folders of runs, or that of a file; in lower case."""
    if not source.is_dir() or source.name.lower().endswith(STORES):
        yield source.name.lower()
        return
    for _, folders, files in os.walk(source):
        if LOCK in files:
            folders.clear()
            continue
        yield from (name.lower() for name in sorted(folders) if name.lower().endswith(STORES))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.lower().endswith(STORES))
        yield from sorted(name.lower() for name in files if not name.startswith("."))


def open_loader(config: Config, processes: Processes) -> Loader:
    """Open the loader of this process, which gives its share of every global batch: patches with `config.patchwise`.

    Raises:
        ConfigError: no samples, fewer than a batch, or others than the model takes; patchwise is true, and something
            needs whole images.
    """
    folder, source = Path(config.output_dir), Path(config.data)
    if config.data in photos.NAMES:
        if processes.first:
            photos.write(config.data, folder / "data")
        processes.broadcast(None)
        source = folder / "data" / config.data / "train"
    with torch.device("meta"):
        model = config.build()
    common: dict[str, Any] = dict(
        batch_size=config.batch_size // processes.world,
        device=processes.device,
        seed=config.seed,
        shard=(processes.rank, processes.world),
        num_threads=config.num_threads,
        quarantine=folder / f"quarantine-{processes.rank}.jsonl",
    )
    try:
        kind = kind_of(source, len(model.grid_size), model.in_chans)
        loader = {"images": _images, "arrays": _arrays, "clips": _clips}[kind](config, source, model, common)
    except ConfigError:
        raise
    except TooFewImages as error:
        noun = {"images": "images", "arrays": "arrays", "clips": "videos"}[kind]
        raise ConfigError(
            f"batch_size must be at most the {error.samples} {noun} of data {config.data}, got {config.batch_size}"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"data {config.data}: {str(error).removeprefix('source ')}") from None
    if config.objective in ("mae", "distill") and takes_pairs(model) != gives_pairs(loader):
        if takes_pairs(model):
            raise ConfigError(
                f"data must be a list of pairs, or inner given, for model {config.model}, which takes two views; got "
                f"data {config.data} and inner none"
            )
        raise ConfigError(f"model {config.model} takes one view, and data {config.data} gives pairs of them")
    return loader


def gives_pairs(loader: Loader) -> bool:
    """Return whether the batches of a loader hold two views: crops inside others, or pairs of pictures."""
    crops = getattr(loader, "crops", None)
    return getattr(crops, "inner", None) is not None or bool(getattr(crops, "pairs", False))


def normalised(config: Config, loader: Loader) -> Config:
    """Return the config with the mean and deviation by which a loader of arrays normalises, measured ones too."""
    if not isinstance(loader, ArrayLoader) or loader.crops.mean is None:
        return config
    stats = {"mean": list(loader.crops.mean), "std": list(loader.crops.std or ())}
    return replace(config, data_options={**config.data_options, **stats})


# ---- images ----------------------------------------------------------------------------------------------------------


def _images(config: Config, source: Path, model: MaskedAutoencoder, common: dict[str, Any]) -> ImageLoader:
    if (len(model.grid_size), model.in_chans) != (2, 3):
        raise ConfigError(
            f"data {config.data} holds pictures, of 3 channels on 2 axes; got in_chans {model.in_chans} and image_size "
            f"{list(model.img_size)}"
        )
    return ImageLoader(
        # a URL is no path
        config.data if "://" in config.data else source,
        **common,
        image_size=(model.img_size[0], model.img_size[1]),
        scale=config.crop_scale,
        flip=config.flip,
        backend=config.backend,
        inner=config.inner,
        **patch_options(config, source, model),
        **_image_options(config, model),
    )


def _image_options(config: Config, model: MaskedAutoencoder) -> dict[str, Any]:
    options = _options(config, ("ratio", "repeats", "covisible", "color_jitter"))
    if not isinstance(covisible := options.pop("covisible", False), bool):
        raise ConfigError(f"data_options.covisible must be true or false, got {covisible!r}")
    if covisible and config.objective == "mae" and not Masks(config.mask_settings, model.grid_size).ranks:
        raise ConfigError('data_options.covisible must be false without a mask of kind "weighted" or "hardest"')
    return {**options, "covisible": model.patch_size if covisible else None}


# ---- clips -----------------------------------------------------------------------------------------------------------


def _clips(config: Config, source: Path, model: MaskedAutoencoder, common: dict[str, Any]) -> ClipLoader:
    if (len(model.grid_size), model.in_chans) != (3, 3):
        raise ConfigError(
            f"data {config.data} holds videos, of 3 channels on 3 axes; got in_chans {model.in_chans} and image_size "
            f"{list(model.img_size)}"
        )
    if config.inner is not None:
        raise ConfigError(f"inner must be none for videos, which data {config.data} holds; got {list(config.inner)}")
    frames, height, width = model.img_size
    return ClipLoader(
        [source] if source.name.lower().endswith(VIDEOS) else source,
        **common,
        num_frames=frames,
        image_size=(height, width),
        flip=config.flip,
        backend=config.backend,
        **patch_options(config, source, model),
        **_options(config, ("sampling_rate", "scale", "ratio", "repeats")),
    )


# ---- arrays ----------------------------------------------------------------------------------------------------------

ARRAY_OPTIONS = ("channels_last", "key", "sample_axis", "flips", "repeats", "nodata", "min_valid", "mean", "std")


def _arrays(config: Config, source: Path, model: MaskedAutoencoder, common: dict[str, Any]) -> ArrayLoader:
    if config.inner is not None:
        raise ConfigError(f"inner must be none for arrays, which data {config.data} holds; got {list(config.inner)}")
    options, axes = _options(config, ARRAY_OPTIONS), len(model.grid_size)
    measured = None
    if not {"mean", "std"} & {*options, *config.model_options}:
        measured = measured_of(source)
    if measured is not None:
        options |= {"mean": measured["mean"], "std": measured["std"]}
    loader = ArrayLoader(
        [source] if source.is_file() or source.name.lower().endswith(STORES) else source,
        **common,
        crop=model.img_size,
        axes=axes,
        **{"patch_size": model.patch_size, **patch_options(config, source, model)},
        **options,
    )
    layout, nodata = loader.layout, loader.crops.nodata
    command = f"fastmim stats {source} --axes {axes}"
    if loader.crops.channels_last:
        command += " --channels-last"
    if options.get("key"):
        command += f" --key {options['key']}"
    if nodata is not None:
        command += f" --nodata={nodata:g}"
    if layout.channels != model.in_chans:
        raise ConfigError(
            f"in_chans must be {layout.channels}, the channels of data {config.data}; got {model.in_chans}"
        )
    if measured is not None:
        now = loader.source.identity(), len(loader.source.names), None if nodata is None else repr(nodata)
        if (measured["of"]["data"], measured["done"], measured["of"]["nodata"]) != now:
            raise ConfigError(
                f"data {config.data}: its statistics are of other arrays or another nodata: run {command} again"
            )
    if loader.crops.mean is None and (layout.dtype not in ("uint8", "uint16") or model.mean is None):
        given = "model_options.mean is for uint8 and uint16; " if "mean" in config.model_options else ""
        run = "" if source.is_file() else f"run {command}, or "
        raise ConfigError(
            f"data {config.data} holds {layout.dtype} arrays, whose mean and deviation must be known: {given}{run}give "
            "data_options.mean and data_options.std"
        )
    return loader


# ---- settings that several loaders share -----------------------------------------------------------------------------


def patch_options(config: Config, source: Path, model: MaskedAutoencoder) -> dict[str, Any]:
    """Return the loader's arguments of a run that reads patches alone; none for one that reads whole images.

    "auto" reads patches where that saves reading: those of a packed source, of the size in which it was cut, without
    those neither kept nor predicted.

    Raises:
        ConfigError: patchwise is true, and something needs whole images.
    """
    auto = config.patchwise == "auto"
    if not config.patchwise or (auto and not _holds_patches(source, model)):
        return {}
    masks = Masks(config.mask_settings, model.grid_size)
    needs_images = {
        f"masks of kind {masks.kind!r}, for which the objective scores whole images": masks.ranks,
        "masks that change while the run goes on, since the loader reads ahead": masks.scheduled,
        "a teacher that sees all": config.objective == "distill" and config.objective_options.get("sees") == "all",
        "data_options.covisible, whose shares are of whole images": bool(config.data_options.get("covisible")),
        "data_options.color_jitter, whose contrast takes the mean of whole crops": bool(
            config.data_options.get("color_jitter")
        ),
        "reconstruct_every, which draws whole images": config.reconstruct_every > 0,
        "backend dali on a GPU, which makes whole crops": config.backend == "dali" and config.device == "cuda",
    }
    for reason, applies in needs_images.items():
        if applies and auto:
            return {}
        if applies:
            raise ConfigError(f'patchwise must be "auto" or false with {reason}; got true')
    if auto and (config.objective not in ("mae", "distill") or sum(masks.counts) == model.num_patches):
        return {}
    return {"patch_size": model.patch_size, "masking": masks}


def _options(config: Config, allowed: tuple[str, ...]) -> dict[str, Any]:
    """Return the further options of the loader."""
    for name in config.data_options:
        if name not in allowed:
            raise ConfigError(
                f"data_options has no {name!r} for data {config.data}; valid ones are {', '.join(allowed)}"
            )
    return dict(config.data_options)
