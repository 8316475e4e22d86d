"""Pictures of a masked autoencoder's input and its reconstruction."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.mae import MaskedAutoencoderViT
from ..models.output import MAEOutput


def draw_grid(model: MaskedAutoencoderViT, images: Tensor, out: MAEOutput, path: Path) -> None:
    """Write the picture of `grid` as a PNG."""
    from PIL import Image

    Image.fromarray(grid(model, images, out)).save(path)


def grid(model: MaskedAutoencoderViT, images: Tensor, out: MAEOutput) -> np.ndarray[Any, Any]:
    """Return a picture uint8 (B·H, 3·W, 3): a row per image of original, masked image and reconstruction.

    The visible patches are pasted into the reconstruction.

    Args:
        model: the model.
        images: uint8 (B, 3, H, W).
        out: the model's output for the images.
    """
    original = images.float() / 255
    removed = out.mask[..., None].float()
    hidden = model.unpatchify(model.patchify(original) * (1 - removed) + 0.5 * removed)
    rows = torch.cat([original, hidden, model.reconstruct(images, out).float()], dim=3)
    picture: np.ndarray[Any, Any] = torch.cat(list(rows), dim=1).permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
    return picture


def read_images(paths: list[Path], size: tuple[int, int]) -> Tensor:
    """Read pictures as uint8 (B, 3, H, W), resized and cut to `size` around their middle.

    Raises:
        ValueError: a file that is no picture.
    """
    from PIL import Image, ImageOps

    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                whole = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} can't be read as a picture: {error}") from None
        pictures.append(np.asarray(ImageOps.fit(whole, size[::-1], Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def find_images(places: list[Path], count: int) -> list[Path]:
    """Return the first `count` pictures among files and folders, sorted by name within a folder.

    Raises:
        ValueError: there are none.
    """
    from PIL import Image

    Image.init()
    suffixes = Image.registered_extensions()
    found: list[Path] = []
    for place in places:
        inside = (
            sorted(path for path in place.rglob("*") if path.suffix.lower() in suffixes) if place.is_dir() else [place]
        )
        found += inside
    if not found:
        raise ValueError(f"IMAGES must be pictures or folders of them; {', '.join(map(str, places))} hold none")
    return found[:count]
