"""The loss that a run minimises: the model's own, distillation, or that of a module of the user's."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import ops
from .._checks import check_count, check_number
from ..data import Batch, CovisibleBatch, PairBatch
from ..masking import Mask
from .values import imported

# values of the setting `objective` that are no class
NAMES = "mae", "distill"
# added to the shares of patches that the other view shows: as weights, they must be above zero
UNSEEN = 0.01


class Objective(nn.Module):
    """Base of the objectives; a module with the attribute `model` and this `forward` serves as well.

    Parameters of its own are trained with the model's, and saved beside them.

    Args:
        model: the model that is trained.
    """

    # declared, so that its verbs are known to type checkers
    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, mask: Mask) -> Tensor:
        """Return the loss, a scalar.

        Args:
            batch: a process's part of an update, as the loader gave it: images (B, C, *img_size), labels where the data
                have any, ids; `pair` of a `PairBatch`, and `covisible` of a `CovisibleBatch`; `valid` of an
                `ArrayBatch`. Where the run reads patches alone (the setting patchwise), they are `fastmim.Patches` in
                place of images, or of the second views, `pair`.
            mask: of the images.
        """
        raise TypeError(f"{type(self).__name__} must define forward(batch, mask)")

    def scores(self, batch: Batch) -> Tensor:
        """Return the weights or the difficulty (B, L) of patches, by which masks "weighted" and "hardest" are drawn."""
        raise TypeError(f'{type(self).__name__} must define scores(batch) for masks of kind "weighted" and "hardest"')

    def after_update(self) -> None:
        """Do what follows each update of the weights, on the device; by default nothing."""


class PixelObjective(Objective):
    """The model's own loss; of pairs, that of predicting patches of `pair` with `images`, whole, as the second view."""

    def forward(self, batch: Batch | PairBatch | CovisibleBatch, mask: Mask) -> Tensor:
        """Return the loss of the model."""
        if isinstance(batch, (PairBatch, CovisibleBatch)):
            loss: Tensor = self.model(batch.pair, mask=mask, context=self.model.encode(batch.images, None)).loss
        else:
            loss = self.model(batch.images, mask=mask).loss
        return loss

    def scores(self, batch: Any) -> Tensor:
        """Return the shares (B, L) of the patches of `pair` that `images` shows, from `UNSEEN` to 1 + `UNSEEN`."""
        if not isinstance(batch, CovisibleBatch):
            return super().scores(batch)
        return batch.covisible + UNSEEN


class Distill(Objective):
    """Distillation of a teacher's features into the student, on visible or on predicted patches.

    With a checkpoint as teacher this is DMAE (Bai et al., CVPR 2023: on="visible", sees="visible", own=1,
    norm_target="l2", loss="absolute"), MaskAlign (Xue et al., CVPR 2023: sees="all", norm_target="layer", loss="huber")
    or MaskDistill (Peng et al., 2022: on="predicted", sees="all"). With `momentum` the teacher is the student's own
    average, as in data2vec (Baevski et al., ICML 2022). Teachers compute nothing after the last block that is compared.

    Args:
        student: the model that is trained, with the verbs of `fastmim.MaskedAutoencoder`.
        teacher: an encoder with the same number of patches, which does not change; None with `momentum`. It moves with
            `to`, and is in neither parameters nor `state_dict`.
        on: "visible": compare states of the student's blocks with the teacher's at prefix and visible tokens;
            "predicted": compare the student's predictions with the teacher's states of the predicted patches.
        sees: the teacher encodes "visible" patches alone or "all".
        taps: blocks of the student whose states are compared; default the last. Without use for on="predicted".
        teacher_taps: blocks of the teacher; default the last. As many as `taps`, compared in the order given; one state
            of the student is compared with the mean of the normalised states of several.
        norm_target: "layer": targets are normalised over their width, without weights; "l2": targets and predictions
            are scaled to length 1; None.
        loss: "squared", "absolute", "huber" (delta 1), or "cosine": 1 - cos.
        own: weight of the student's own loss, which is added.
        momentum: of the teacher that is the average of the student, after each update momentum · average +
            (1 − momentum) · student.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: neither or both of teacher and momentum; an unknown choice; taps that don't match; a model without a
            decoder, of which only predicted patches are compared.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any = None,
        *,
        on: Literal["visible", "predicted"] = "visible",
        sees: Literal["visible", "all"] = "visible",
        taps: Sequence[int] | None = None,
        teacher_taps: Sequence[int] | None = None,
        norm_target: Literal["layer", "l2"] | None = "layer",
        loss: Literal["squared", "absolute", "huber", "cosine"] = "huber",
        own: float = 0.0,
        momentum: float | None = None,
    ) -> None:
        super().__init__(student)
        for name, value, allowed in (
            ("on", on, ("visible", "predicted")),
            ("sees", sees, ("visible", "all")),
            ("norm_target", norm_target, ("layer", "l2", None)),
            ("loss", loss, ("squared", "absolute", "huber", "cosine")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
        if (teacher is None) == (momentum is None):
            raise ValueError(
                "objective_options must hold either teacher, a checkpoint, or momentum, of a teacher that is the "
                f"average of the student; got {'neither' if teacher is None else 'both'}"
            )
        if on == "predicted" and (sees == "visible" or own):
            raise ValueError('on="predicted" needs sees="all" and own=0: predictions are features of patches not seen')
        if on == "visible" and getattr(student, "decoder", "self") is None:
            raise ValueError(
                'on must be "predicted" for a model whose mask tokens go through the encoder, got "visible"'
            )
        if sees == "visible" and getattr(teacher, "decoder", "self") is None:
            raise ValueError('sees must be "all" for a teacher whose mask tokens go through the encoder, got "visible"')
        if not check_number("own", own) >= 0:
            raise ValueError(f"own must not be negative, got {own}")
        if momentum is not None and not 0 <= check_number("momentum", momentum) < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.on, self.sees, self.norm_target, self.kind = on, sees, norm_target, loss
        self.own, self.momentum = own, momentum
        if teacher is None:
            self.average = teacher = copy.deepcopy(student)
        elif teacher.num_patches != student.num_patches:
            raise ValueError(
                f"teacher must have the student's {student.num_patches} patches, got {teacher.num_patches}"
            )
        teacher.requires_grad_(False)
        # in a tuple, so that a teacher that does not change is neither saved nor exchanged between processes
        self._teacher = (teacher.eval(),)
        self.teacher_taps = _taps("teacher_taps", teacher_taps, len(teacher.blocks))
        self.taps = _taps("taps", taps, len(student.blocks)) if on == "visible" else ()
        outputs = len(self.taps) or 1
        if outputs > 1 and outputs != len(self.teacher_taps):
            raise ValueError(
                f"taps and teacher_taps must be of one length, or taps of one block; got {self.taps} and "
                f"{self.teacher_taps}"
            )
        width = student.decoder_pred.out_features if on == "predicted" else student.embed_dim
        self.projections = nn.ModuleList(nn.Linear(width, teacher.embed_dim) for _ in range(outputs))
        self.projections.to(student.patch_embed.proj.weight)
        if on == "visible" and not own:
            self._freeze_unused()

    def forward(self, batch: Batch, mask: Mask) -> Tensor:
        """Return the loss of distillation, and with `own` the student's own loss added."""
        student, images = self.model, batch.images
        own: Tensor | float = 0.0
        if self.on == "predicted":
            states, valid = [student.predict(images, mask)], mask.valid_predict
        elif self.own:
            latent, states = student.encode(images, mask, taps=self.taps)
            own, valid = self.own * student.loss(student.decode(latent, mask), images, mask), mask.valid_keep
        else:
            (_, states), valid = student.encode(images, mask, taps=self.taps, stop=True), mask.valid_keep
        targets = self._targets(images, mask)
        losses = [
            self._loss(projection(state.to(projection.weight.dtype)), target, valid)
            for projection, state, target in zip(self.projections, states, targets)
        ]
        return torch.stack(losses).mean() + own

    def train(self, mode: bool = True) -> "Distill":
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self._teacher[0].eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        """Apply what `to`, `cuda` and the like do to the teacher too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.momentum is None and recurse:
            self._teacher[0]._apply(fn)
        return self

    def after_update(self) -> None:
        """Move a teacher that is the student's average towards the student."""
        if self.momentum is not None:
            move_average(list(self.average.parameters()), list(self.model.parameters()), self.momentum)

    @torch.no_grad()
    def _targets(self, images: Any, mask: Mask) -> list[Tensor]:
        """Return what each state of the student is compared with, float32 or float64."""
        (teacher,) = self._teacher
        _, states = teacher.encode(images, mask if self.sees == "visible" else None, taps=self.teacher_taps, stop=True)
        prefix = teacher.num_prefix_tokens
        own_prefix = self.model.num_prefix_tokens
        found = []
        for state in states:
            if self.sees == "all":
                ids = mask.ids_keep if self.on == "visible" else mask.ids_predict
                patches = ops.gather_tokens(state[:, prefix:], ids)
            else:
                patches = state[:, prefix:]
            if self.on == "visible" and prefix == own_prefix:
                patches = torch.cat([state[:, :prefix], patches], 1)
            patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
            if self.norm_target == "layer":
                patches = F.layer_norm(patches, patches.shape[-1:])
            elif self.norm_target == "l2":
                patches = F.normalize(patches, dim=-1)
            found.append(patches)
        return found if len(self.projections) == len(found) else [torch.stack(found).mean(0)]

    def _loss(self, pred: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        """Return the mean loss of pred (B, S, D) over valid tokens; both have prefix tokens, or only pred has."""
        pred = pred[:, pred.shape[1] - target.shape[1] :].to(target.dtype)
        if self.norm_target == "l2":
            pred = F.normalize(pred, dim=-1)
        if self.kind == "cosine":
            rows = 1 - F.cosine_similarity(pred, target, dim=-1)
        else:
            rows = _ERRORS[self.kind](pred, target, reduction="none").mean(-1)
        if valid is None:
            return rows.mean()
        weight = torch.cat([valid.new_ones(len(valid), rows.shape[1] - valid.shape[1]), valid], 1)
        return rows.where(weight, 0).sum() / weight.sum()

    def _freeze_unused(self) -> None:
        """Freeze what the loss does not depend on: decoder, final norm, and blocks after the last tap."""
        last = max(self.taps)
        for name, parameter in self.model.named_parameters():
            part, _, rest = name.partition(".")
            block = int(rest.partition(".")[0]) if part == "blocks" else -1
            if part in ("norm", "mask_token") or part.startswith("decoder_") or block > last:
                parameter.requires_grad_(False)


_ERRORS: dict[str, Callable[..., Tensor]] = {
    "squared": F.mse_loss,
    "absolute": F.l1_loss,
    "huber": F.huber_loss,
}


def _taps(name: str, taps: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the checked numbers of blocks; default the last."""
    if taps is None:
        return (depth - 1,)
    if not taps:
        raise ValueError(f"{name} must name at least one block, got {taps!r}")
    return tuple(check_count(name, tap, 0, depth - 1) for tap in taps)


@torch.no_grad()
def move_average(averages: list[Tensor], values: list[Tensor], momentum: float) -> None:
    """Replace averages by momentum · average + (1 − momentum) · value."""
    get_ema_multi_avg_fn(momentum)(averages, values, None)


# ---- from settings ---------------------------------------------------------------------------------------------------


def build(name: str, options: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Return the objective called `name` of a model: "mae", "distill", or the class "package.module:Class".

    A class is called with the model and the options. `teacher` of "distill" is the path of a checkpoint.

    Raises:
        TypeError, ValueError: an unknown objective, wrong options.
    """
    if name == "mae":
        if options:
            raise ValueError(f"objective_options must be empty for objective mae, got {dict(options)}")
        return PixelObjective(model)
    if name == "distill":
        return Distill(model, **{**options, "teacher": _teacher(options.get("teacher"), model)})
    objective = imported("objective", name, NAMES)(model, **options)
    if not isinstance(objective, nn.Module) or getattr(objective, "model", None) is not model:
        raise TypeError(f"objective {name} must be a torch.nn.Module that has its first argument as attribute model")
    return objective


def _teacher(path: Any, model: nn.Module) -> nn.Module | None:
    from pathlib import Path

    from .load_run import load_model

    if path is None:
        return None
    if not isinstance(path, str):
        raise TypeError(f"teacher must be the path of a checkpoint, got {path!r}")
    like = next(model.parameters())
    return load_model(Path(path).expanduser(), allow_missing="decoder").to(like.device, like.dtype)
