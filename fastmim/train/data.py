"""The loader of a run."""

from pathlib import Path
from typing import Any

import torch

from ..data import ImageLoader
from ..data.base_loader import TooFewImages
from ..data.packed import INDEX
from ..data.remote import is_url
from . import digits
from .config import Config, ConfigError
from .distributed import Processes
from .masks import Masks


def open_loader(config: Config, processes: Processes) -> ImageLoader:
    """Open the loader of this process, which gives its share of every global batch: patches with `config.patchwise`.

    Raises:
        ConfigError: no images, or fewer than a batch; patchwise is true, and something needs whole images.
    """
    folder, source = Path(config.output_dir), config.data if is_url(config.data) else Path(config.data)
    if config.data in digits.NAMES:
        if processes.first:
            digits.write(config.data, folder / "data")
        processes.broadcast(None)
        source = folder / "data" / config.data / "train"
    patches = _patches(config, source)
    try:
        loader = ImageLoader(
            source,
            config.batch_size // processes.world,
            image_size=config.image_size,
            scale=config.crop_scale,
            flip=config.flip,
            backend=config.backend,
            device=processes.device,
            seed=config.seed,
            shard=(processes.rank, processes.world),
            num_threads=config.num_threads,
            quarantine=folder / f"quarantine-{processes.rank}.jsonl",
            **patches,
        )
    except TooFewImages as error:
        raise ConfigError(
            f"batch_size must be at most the {error.samples} images of data {config.data}, got {config.batch_size}"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"data {config.data}: {str(error).removeprefix('source ')}") from None
    if loader.crops.pairs and config.objective in ("mae", "distill"):
        raise ConfigError(
            f"objective must be a class that takes pairs with data {config.data}, got {config.objective!r}"
        )
    return loader


def _patches(config: Config, source: str | Path) -> dict[str, Any]:
    """Return the loader's arguments of a run that reads patches alone; none for one that reads whole images.

    "auto" reads patches where that saves reading: those of a packed source, without those neither kept nor predicted.

    Raises:
        ConfigError: patchwise is true, and something needs whole images.
    """
    auto = config.patchwise == "auto"
    if not config.patchwise or (auto and not Path(source, INDEX).is_file()):
        return {}
    with torch.device("meta"):
        model = config.build()
    masks = Masks(config.mask_settings, model.patch_embed.grid_size)
    needs_images = {
        f"masks of kind {masks.kind!r}, for which the objective scores whole images": masks.ranks,
        "masks that change while the run goes on, since the loader reads ahead": masks.scheduled,
        "a teacher that sees all": config.objective == "distill" and config.objective_options.get("sees") == "all",
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
