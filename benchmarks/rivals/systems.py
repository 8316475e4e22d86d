"""Systems that throughput.py measures: fastmim's models, their plain forms, inputs and masks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastmim
from fastmim import Mask, masking
from fastmim.data import Batch
from fastmim.train.objective import Distill
from pictures.photographs import Photographs
from rivals.plain_mae import Plain, PlainGatherMAE, PlainMAE
from rivals.plain_systems import PlainCrossMAE, PlainDMAE, PlainVideoMAE, tap
from rivals.sizes import Cell, Sizes

DEFAULT_CELLS = (Cell(0.75, 1.0), Cell(0.98, 1.0), Cell(0.98, 0.1))
FULL_CELLS = tuple(Cell(r, q) for r in (0.75, 0.9, 0.95, 0.98) for q in (1.0, 0.25, 0.1) if q == 1 or r > 0.9)
# side of Pixio's cells, in patches
CELL = 4
Draw = Callable[..., Mask]


@dataclass(frozen=True)
class System:
    """A system at one size.

    Args:
        build: makes fastmim's model, from the argument `img_size`.
        plain: the plain forms by the names of peers; "plain-gather" has the same algorithm.
        draw: draws masks (grid, batch, cell, generator=, device=), outside the clock; None: each contestant makes its
            own of noise, inside.
        cells, full_cells: lines of the table, and with --full.
        image_size: default.
        patch_size: side of a patch.
        multiple: what an image size must be a multiple of.
        frames: of a clip; 0: images.
        batch_size: default on a CPU.
        huggingface: Hugging Face has the model too.
    """

    build: Callable[..., nn.Module]
    plain: Mapping[str, Callable[[Sizes], Plain]] = field(
        default_factory=lambda: {"plain-gather": PlainGatherMAE, "plain": PlainMAE}
    )
    draw: Draw | None = None
    cells: Sequence[Cell] = DEFAULT_CELLS
    full_cells: Sequence[Cell] | None = None
    image_size: int = 224
    patch_size: int = 16
    multiple: int = 16
    frames: int = 0
    batch_size: int = 8
    huggingface: bool = False

    @property
    def peers(self) -> tuple[str, ...]:
        """Return the names of the peers, that of the same algorithm first."""
        return (*self.plain, *["huggingface"] * self.huggingface)

    def input_size(self, image_size: int) -> tuple[int, ...]:
        """Return the size of an image or a clip."""
        return (self.frames,) * (self.frames > 0) + (image_size,) * 2

    def template(self, image_size: int) -> nn.Module:
        """Return a fastmim model with weights of its own."""
        size = self.input_size(image_size)
        return self.build(img_size=size if self.frames else image_size)

    def sizes(self, template: nn.Module) -> Sizes:
        """Return the sizes of a model that `template` has made."""
        distilled = isinstance(template, DMAE)
        student = template.student if distilled else template
        draw = None if self.draw is None else partial(self.draw, student.grid_size)
        return Sizes.of(student, draw=draw, teacher=Sizes.of(template.teacher) if distilled else None)

    def inputs(self, pictures: Photographs, count: int, image_size: int) -> Tensor:
        """Return uint8 images (count, 3, H, W), or clips (count, 3, T, H, W) that pan over photographs."""
        if not self.frames:
            return pictures.crops(count, image_size)
        crops = pictures.crops(count, image_size + self.frames - 1)
        return torch.stack([crops[..., t : t + image_size, t : t + image_size] for t in range(self.frames)], 2)

    def check(self, image_size: int, cell: Cell) -> None:
        """Check that a cell keeps and removes some patches.

        Raises:
            ValueError: it doesn't, or is none of the system's masks.
        """
        size = image_size // self.patch_size
        if self.draw is None:
            draw_patches((size, size), 1, cell)
        else:
            # counts don't depend on the number of frames
            self.draw((1,) * (self.frames > 0) + (size, size), 1, cell)


class Loss(NamedTuple):
    loss: Tensor


class DMAE(nn.Module):
    """Distillation of the first blocks of a teacher, with the call of the other models.

    The distance is squared: the gradient of DMAE's, which is absolute, jumps, so that roundings can't be compared.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        depth = len(student.blocks)
        objective = Distill(student, teacher, taps=[tap(depth)], norm_target="l2", loss="squared", own=1.0)
        self.student, self.teacher, self.projections = student, teacher, objective.projections
        # not a submodule: parameters have one name
        self.objective = (objective,)

    def forward(self, images: Tensor, mask: Mask) -> Loss:
        """Return the loss."""
        return Loss(self.objective[0](Batch(images, None, None), mask))


def dmae(img_size: int, student: Callable[..., nn.Module], **teacher: Any) -> DMAE:
    """Return a student and a teacher of these sizes, all of whose blocks run."""
    return DMAE(student(img_size=img_size), fastmim.Encoder(img_size, 16, **teacher))


# ---- masks -----------------------------------------------------------------------------------------------------------


def draw_patches(grid: Sequence[int], batch: int, cell: Cell, **options: Any) -> Mask:
    """Draw patches at random."""
    return masking.random(batch, math.prod(grid), cell.mask_ratio, decode_ratio=cell.decode_ratio, **options)


def draw_cells(grid: Sequence[int], batch: int, cell: Cell, **options: Any) -> Mask:
    """Draw Pixio's cells."""
    return masking.cells(batch, grid, CELL, cell.mask_ratio, decode_ratio=cell.decode_ratio, **options)


def draw_tubes(grid: Sequence[int], batch: int, cell: Cell, **options: Any) -> Mask:
    """Draw VideoMAE's tubes; below a decode ratio of 1 decode VideoMAE V2's running cells."""
    if cell.decode_ratio < 1:
        options |= {"decode": "running_cell", "decode_ratio": cell.decode_ratio}
    return masking.tube(batch, grid, cell.mask_ratio, **options)


# ---- the systems -----------------------------------------------------------------------------------------------------


def _mae(build: Callable[..., nn.Module], patch_size: int = 16) -> System:
    build = partial(build, norm_pix_loss=True)
    return System(build, patch_size=patch_size, multiple=patch_size, full_cells=FULL_CELLS, huggingface=True)


_TINY: dict[str, Any] = dict(embed_dim=48, depth=4, num_heads=3)
_TINY_DECODER: dict[str, Any] = dict(decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
_VIDEO: dict[str, Any] = dict(
    plain={"plain-gather": PlainVideoMAE},
    draw=draw_tubes,
    cells=(Cell(0.9, 1.0), Cell(0.9, 0.5)),
    batch_size=2,
    huggingface=True,
)
_CROSS: dict[str, Any] = dict(
    plain={"plain-gather": PlainCrossMAE}, draw=draw_patches, cells=(Cell(0.75, 1.0), Cell(0.75, 1 / 3))
)
_PIXIO: dict[str, Any] = dict(
    draw=draw_cells, multiple=16 * CELL, image_size=256, cells=(Cell(0.75, 1.0), Cell(0.75, 0.25), Cell(0.75, 0.1))
)
_DMAE: dict[str, Any] = dict(
    plain={"plain-gather": PlainDMAE}, draw=draw_patches, cells=(Cell(0.75, 1.0), Cell(0.75, 0.25))
)

SYSTEMS = {
    "tiny": _mae(fastmim.mae_vit_tiny_patch16),
    "small": _mae(fastmim.mae_vit_small_patch16),
    "base": _mae(fastmim.mae_vit_base_patch16),
    "large": _mae(fastmim.mae_vit_large_patch16),
    "huge": _mae(fastmim.mae_vit_huge_patch14, 14),
    "videomae_tiny": System(partial(fastmim.VideoMAE, **_TINY, **_TINY_DECODER), frames=4, **_VIDEO),
    "videomae_base": System(fastmim.videomae_vit_base_patch16, frames=16, **_VIDEO),
    "crossmae_tiny": System(partial(fastmim.CrossMAE, **_TINY, **_TINY_DECODER), **_CROSS),
    "crossmae_base": System(fastmim.crossmae_vit_base_patch16, **_CROSS),
    "pixio_tiny": System(partial(fastmim.Pixio, **_TINY, **_TINY_DECODER), **_PIXIO),
    "pixio_base": System(fastmim.pixio_vit_base_patch16, **_PIXIO),
    "dmae_tiny": System(
        partial(dmae, student=partial(fastmim.MaskedAutoencoderViT, **_TINY, **_TINY_DECODER), **_TINY), **_DMAE
    ),
    # the first 18 of the 24 blocks of a ViT-L teach
    "dmae": System(
        partial(dmae, student=fastmim.mae_vit_base_patch16, embed_dim=1024, depth=18, num_heads=16), **_DMAE
    ),
}
