"""timm's vision transformer on whole images, as it comes and accelerated: a classifier's step."""

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmim
from rivals.contestants import ACCELERATED, Batch, Contestant, Setting, adamw
from rivals.sizes import Cell, Sizes

WHOLE = Cell(0.0, 1.0)
CLASSES = 1000


class WholeImage(Contestant):
    """timm's `VisionTransformer` of the same sizes as `template`, with the same weights each time."""

    def __init__(self, form: str, setting: Setting, sizes: Sizes) -> None:
        self.form, self.name, self.setting, self.sizes = form, form, setting, sizes
        self.compiled, self.attention = False, ""
        torch.manual_seed(0)
        self.model = (
            _timm()
            .models.VisionTransformer(
                img_size=sizes.image,
                patch_size=sizes.patch,
                embed_dim=sizes.width,
                depth=sizes.depth,
                num_heads=sizes.heads,
                num_classes=CLASSES,
            )
            .to(setting.device)
        )
        if form.endswith(ACCELERATED):
            fastmim.accelerate(self.model)
        self.optimizer = adamw(self.model)

    def enter(self, cell: Cell) -> None:
        """Do nothing: there is one cell only."""

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of arbitrary labels."""
        labels = torch.arange(len(batch.floats), device=batch.floats.device) % CLASSES
        return F.cross_entropy(self.model(batch.floats), labels)


def contestants(setting: Setting, sizes: Sizes) -> tuple[WholeImage, WholeImage]:
    """Return timm's model as it comes, and accelerated."""
    return WholeImage("timm", setting, sizes), WholeImage("timm" + ACCELERATED, setting, sizes)


def installed() -> bool:
    """Return whether timm can be imported."""
    try:
        _timm()
    except ImportError:
        return False
    return True


def _timm():
    """Import timm, which needs torchvision; the tests' stand-in is enough for its models."""
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
    try:
        with importlib.import_module("torchvision_stub").torchvision():
            return importlib.import_module("timm")
    finally:
        sys.path.pop()
