"""The loading recipe that people start from, as facebookresearch/mae has it, without torchvision.

Worker processes decode with Pillow, crop and resize bicubically, mirror, and normalise to float32.
"""

import math
import random
from pathlib import Path

import numpy as np
import torch
from photographs import MEAN, STD
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Folder(Dataset[Tensor]):
    """Float images (3, size, size) of the JPEGs below a folder."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths, self.size = sorted(folder.rglob("*.jpg")), size
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with open(self.paths[index], "rb") as file:
            picture = Image.open(file).convert("RGB")
        crop = picture.crop(_box(*picture.size)).resize((self.size, self.size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(self.mean).div_(self.std)


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = random.uniform(0.2, 1) * width * height
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def recipe(folder: Path, batch_size: int, size: int, workers: int) -> DataLoader[Tensor]:
    """Its batches: float32 (B, 3, size, size)."""
    return DataLoader(
        Folder(folder, size),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
