"""The loader of a run."""

from pathlib import Path

from ..data import ImageLoader
from ..data.base_loader import TooFewImages
from . import digits
from .config import Config, ConfigError
from .distributed import Processes


def open_loader(config: Config, processes: Processes) -> ImageLoader:
    """Open the loader of this process, which gives its share of every global batch.

    Raises:
        ConfigError: no images, or fewer than a batch.
    """
    folder, source = Path(config.output_dir), Path(config.data)
    if config.data in digits.NAMES:
        if processes.first:
            digits.write(config.data, folder / "data")
        processes.broadcast(None)
        source = folder / "data" / config.data / "train"
    try:
        return ImageLoader(
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
        )
    except TooFewImages as error:
        raise ConfigError(
            f"batch_size must be at most the {error.samples} images of data {config.data}, got {config.batch_size}"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"data {config.data}: {str(error).removeprefix('source ')}") from None
