"""Loading as in facebookresearch/mae, without torchvision.

Worker processes decode with Pillow, crop and resize bicubically, mirror, and normalise to float32.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmim.models.arguments import IMAGENET_MEAN, IMAGENET_STD
from pictures.photographs import random_box


class Folder(Dataset[Tensor]):
    """Float images (3, size, size) of the JPEGs below a folder."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths, self.size = sorted(folder.rglob("*.jpg")), size
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with open(self.paths[index], "rb") as file:
            picture = Image.open(file).convert("RGB")
        crop = picture.crop(random_box(*picture.size, random))
        crop = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(self.mean).div_(self.std)


def recipe(folder: Path, batch_size: int, size: int, workers: int) -> DataLoader[Tensor]:
    """Return a DataLoader of float32 (B, 3, size, size)."""
    return DataLoader(
        Folder(folder, size),
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
