"""Pictures of a masked autoencoder's input and its reconstruction."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.masked_autoencoder import MaskedAutoencoder
from ..models.output import MAEOutput
from ..models.pictures import paste
from ..nn.patch_embed import normalized

# pixels: the least side of a panel, the height of its label, the space around it
LEAST, LABEL, MARGIN = 192, 24, 4
COLUMNS = ("visible", "reconstruction", "original")


def draw_grid(model: MaskedAutoencoder, images: Tensor, out: MAEOutput, path: Path) -> None:
    """Write the panels of each image as a PNG, a row per image, below the names of the columns.

    Panels with sides below 192 pixels are enlarged, each pixel to a square of pixels. Arguments are those of `panels`.
    """
    from PIL import Image, ImageDraw, ImageFont

    drawn = panels(model, images, out)
    count, columns, height, width, _ = drawn.shape
    scale = -(-LEAST // max(height, width))
    size = width * scale, height * scale
    wide, high = max(size[0], LEAST) + 2 * MARGIN, size[1] + 2 * MARGIN
    sheet = Image.new("RGB", (columns * wide, LABEL + count * high), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LABEL * 2 // 3)
    for column, name in enumerate(COLUMNS):
        left = column * wide + MARGIN
        draw.text((left, LABEL // 2), name, "black", font, anchor="lm")
        for row in range(count):
            panel = Image.fromarray(drawn[row, column]).resize(size, Image.Resampling.NEAREST)
            sheet.paste(panel, (left, LABEL + row * high + MARGIN))
    sheet.save(path)


def panels(model: MaskedAutoencoder, images: Tensor, out: MAEOutput) -> np.ndarray[Any, Any]:
    """Return pictures uint8 (B, 3, H, W, 3): of each image the visible patches, the reconstruction and the original.

    Among the visible patches removed ones are white. In the reconstruction the visible patches are pasted, and those
    neither visible nor predicted are grey. A model with norm_pix_loss predicts patches up to their mean and deviation,
    which are taken from the original. Of three axes the middle plane of the first is drawn, such as the middle frame of
    a clip; of one axis a row of pixels for each channel. Three channels are red, green and blue; of other numbers the
    first is drawn, in grey. Floating images are drawn from the 1st to the 99th percentile of each.

    Args:
        model: the model.
        images: (B, C, *img_size), uint8, uint16 or floating.
        out: the model's output for the images.
    """
    if images.is_floating_point():
        neutral = (0.0,) * model.in_chans, (1.0,) * model.in_chans
        # in the scale of the targets
        original = normalized(images, *model._target_stats(images), None).float()
        made = model.unpatchify(paste(model.patchify(original), out, model.norm_pix_loss, *neutral))
        low, high = (original.flatten(1).quantile(q, 1).view(-1, *[1] * (images.dim() - 1)) for q in (0.01, 0.99))
        original, made = ((x - low) / (high - low).clamp(min=1e-6) for x in (original, made))
    else:
        original, made = images.float() / torch.iinfo(images.dtype).max, model.reconstruct(images, out).float()
    removed = out.mask[..., None].float()
    visible = model.unpatchify(model.patchify(original) * (1 - removed) + removed)
    rows = torch.stack([_picture(part.clamp(0, 1)) for part in (visible, made, original)], dim=1)
    drawn: np.ndarray[Any, Any] = rows.permute(0, 1, 3, 4, 2).mul(255).round().byte().cpu().numpy()
    return drawn


def _picture(values: Tensor) -> Tensor:
    """Return pictures (B, 3, H, W) of values (B, C, *size)."""
    if values.dim() == 3:
        return values[:, None].expand(-1, 3, -1, -1)
    if values.dim() == 5:
        values = values[:, :, values.shape[2] // 2]
    return values if values.shape[1] == 3 else values[:, :1].expand(-1, 3, -1, -1)


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
    """Return at most `count` pictures among files and folders, sorted by name within a folder.

    Of more than `count` they are taken at equal distances, so that each of a few class folders is seen.

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
    count = min(count, len(found))
    return [found[index * len(found) // count] for index in range(count)]
