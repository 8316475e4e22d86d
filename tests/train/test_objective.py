"""Objectives, masks and averages of a run: formulas, exact resume, processes, and settings that are refused."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_run import SETTINGS, curve, launch, outcome

from fastmim import MaskedAutoencoder, masking
from fastmim.data import Batch
from fastmim.train import Config, ConfigError, Distill, Objective, Trainer
from fastmim.train.load_run import load_model
from fastmim.train.masks import Masks

SIZES = dict(embed_dim=16, depth=3, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def model_of(**changes):
    return MaskedAutoencoder(16, 4, **{**SIZES, **changes}).double()


def images_of(batch=3):
    return Batch(torch.randn(batch, 3, 16, 16, dtype=torch.float64), None, torch.arange(batch))


# ---- distillation ----------------------------------------------------------------------------------------------------


def test_dmae_equals_its_formula():
    """Compare with L1 between normalised features of a block of each, plus the pixel loss."""
    torch.manual_seed(0)
    student, teacher = model_of(), model_of(embed_dim=24, num_heads=3)
    options = dict(taps=[1], teacher_taps=[2], norm_target="l2", loss="absolute", own=1.0)
    distill = Distill(student, teacher, **options)
    batch, mask = images_of(), masking.random(3, 16, 0.75)
    loss = distill(batch, mask)

    out = student(batch.images, mask=mask)
    _, (theirs,) = teacher.encode(batch.images, mask, taps=[2])
    _, (ours,) = student.encode(batch.images, mask, taps=[1])
    ours = F.linear(ours, distill.projections[0].weight, distill.projections[0].bias)
    expected = out.loss + (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).abs().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in distill.parameters() if p.requires_grad)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.fault
def test_blocks_are_compared_in_the_order_given():
    torch.manual_seed(0)
    student, teacher = model_of(), model_of()
    distill = Distill(student, teacher, taps=[1, 0], teacher_taps=[0, 2], norm_target=None, loss="squared")
    batch, mask = images_of(), masking.random(3, 16, 0.75)
    pairs = zip(
        distill.projections,
        student.encode(batch.images, mask, taps=[1, 0])[1],
        teacher.encode(batch.images, mask, taps=[0, 2])[1],
        strict=True,
    )
    expected = sum(F.mse_loss(projection(ours), theirs) for projection, ours, theirs in pairs) / 2
    torch.testing.assert_close(distill(batch, mask), expected, rtol=1e-12, atol=0)


def test_features_of_predicted_patches_are_those_of_the_whole_image():
    torch.manual_seed(0)
    teacher = model_of()
    student = model_of(decoder=None)
    distill = Distill(student, teacher, on="predicted", sees="all", loss="squared", teacher_taps=[0, 2])
    batch, mask = images_of(), masking.random(3, 16, 0.5)
    _, states = teacher.encode(batch.images, None, taps=[0, 2])
    targets = sum(F.layer_norm(state[:, 1:], (16,)) for state in states) / 2
    targets = targets.gather(1, mask.ids_predict[..., None].expand(-1, -1, 16))
    pred = distill.projections[0](student.predict(batch.images, mask))
    torch.testing.assert_close(distill(batch, mask), F.mse_loss(pred, targets), rtol=1e-12, atol=0)


def test_a_teacher_that_sees_all_is_compared_at_the_visible_patches():
    torch.manual_seed(0)
    student = model_of()
    teacher = copy.deepcopy(student)
    distill = Distill(student, teacher, sees="all", loss="cosine", norm_target=None)
    with torch.no_grad():
        distill.projections[0].weight.copy_(torch.eye(16))
        distill.projections[0].bias.zero_()
    everything = masking.Mask(
        *(torch.arange(16).expand(3, -1)[:, part] for part in (slice(None), slice(0))),
        *(torch.arange(16).expand(3, -1), 16),
    )
    assert abs(distill(images_of(), everything).item()) < 1e-12


def test_ragged_rows_count_their_valid_tokens_alone():
    torch.manual_seed(0)
    distill = Distill(model_of(), model_of())
    batch = images_of(2)
    removed = torch.ones(2, 16, dtype=torch.bool)
    removed[0, :3] = removed[1, :6] = False
    both = masking.from_bool(removed, ragged=True)
    rows = [masking.from_bool(removed[row : row + 1]) for row in (0, 1)]
    alone = [distill(Batch(batch.images[i : i + 1], None, batch.ids[:1]), rows[i]) for i in (0, 1)]
    expected = (alone[0] * 4 + alone[1] * 7) / 11
    torch.testing.assert_close(distill(batch, both), expected, rtol=1e-12, atol=0)


def test_a_teacher_that_is_the_average_moves_with_the_student():
    distill = Distill(model_of(), momentum=0.75)
    before = distill.average.norm.weight.clone()
    with torch.no_grad():
        distill.model.norm.weight.add_(1)
    distill.after_update()
    torch.testing.assert_close(distill.average.norm.weight, before + 0.25)
    assert not distill.average.training and not distill.train().average.training


@pytest.mark.fault
def test_a_teacher_moves_with_its_objective():
    """It stayed where it was made, so that `to` left half of the objective on another device, in another dtype."""
    student, teacher = model_of(), model_of(embed_dim=24, num_heads=3)
    distill = Distill(student, teacher).float()
    batch = images_of()._replace(images=torch.randn(3, 3, 16, 16))
    assert teacher.norm.weight.dtype == torch.float32 == distill(batch, masking.random(3, 16, 0.75)).dtype
    distill.to("meta")
    assert {value.device.type for value in (*teacher.parameters(), *distill.parameters())} == {"meta"}
    owned = {id(value) for value in teacher.parameters()}
    assert not owned & {id(value) for value in distill.parameters()}
    assert {name.partition(".")[0] for name in distill.state_dict()} == {"model", "projections"}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "either teacher"),
        (dict(momentum=1.0), "momentum must be in"),
        (dict(momentum=0.9, on="all"), "on must be one of visible, predicted"),
        (dict(momentum=0.9, on="predicted"), 'needs sees="all"'),
        (dict(momentum=0.9, taps=[3]), "taps"),
        (dict(momentum=0.9, taps=[]), "taps must name at least one block"),
        (dict(momentum=0.9, teacher_taps=()), "teacher_taps must name at least one block"),
        (dict(momentum=0.9, taps=[0, 1], teacher_taps=[0, 1, 2]), "of one length"),
        (dict(momentum=0.9, own=-1), "own must not be negative"),
    ],
)
def test_distill_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Distill(model_of(), **options)


# ---- runs ------------------------------------------------------------------------------------------------------------


class Hardest(Objective):
    """The model's loss, and difficulty by a parameter of its own, for masks that rank patches."""

    def __init__(self, model, *, start):
        super().__init__(model)
        self.scale = torch.nn.Parameter(torch.full((2, 2), start))

    def forward(self, batch, mask):
        return self.model(batch.images, mask=mask).loss * self.scale.mean()

    def scores(self, batch):
        return batch.images.float().flatten(1)[:, :16] * self.scale.detach().mean()


DISTILL = {"objective": "distill", "objective_options": {"momentum": 0.9, "own": 1.0, "taps": [0]}, "ema": 0.8}
HARDEST = {
    "objective": f"{__name__}:Hardest",
    "objective_options": {"start": 1.5},
    "mask": {"kind": "hardest", "mask_ratio": [0.5, 0.75], "share": [0.0, 0.5]},
}


@pytest.mark.parametrize("settings", [DISTILL, HARDEST], ids=["distill", "hardest"])
def test_a_run_continues_exactly(config, tmp_path, settings):
    Trainer(config("straight", **settings)).run()
    changed = config("again", **settings)
    Trainer(changed).run()
    # as after a kill -9
    shutil.rmtree(tmp_path / "again" / "final")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000012")
    Trainer(changed).run()
    assert outcome(tmp_path / "again") == outcome(tmp_path / "straight")
    files = sorted(path.name for path in (tmp_path / "straight" / "final").glob("*.safetensors"))
    assert files == (["ema.safetensors"] if "ema" in settings else []) + ["model.safetensors", "objective.safetensors"]
    for name in files:
        ours, theirs = (load_file(tmp_path / run / "final" / name) for run in ("again", "straight"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


class Varied(Objective):
    """The model's loss, and difficulty by the model's own features."""

    def forward(self, batch, mask):
        return self.model(batch.images, mask=mask).loss

    @torch.no_grad()
    def scores(self, batch):
        return self.model.encode(batch.images, None)[:, 1:].float().var(2)


@pytest.mark.fault
def test_a_sharded_model_scores_patches(config, tmp_path):
    """Its weights were not gathered for the scores, which raised."""
    settings = {**HARDEST, "objective": f"{__name__}:Varied", "objective_options": {}, "max_steps": 4}
    for parallel in ("ddp", "fsdp"):
        Trainer(config(parallel, parallel=parallel, **settings)).run()
    assert outcome(tmp_path / "ddp") == outcome(tmp_path / "fsdp")


def test_the_average_is_loaded(config, tmp_path):
    Trainer(config(ema=0.5)).run()
    model, average = load_model(tmp_path / "run"), load_model(tmp_path / "run", ema=True)
    assert not torch.equal(model.mask_token, average.mask_token) and torch.equal(model.pos_embed, average.pos_embed)
    torch.testing.assert_close(model.mask_token, average.mask_token, rtol=0, atol=0.1)
    Trainer(config("none")).run()
    with pytest.raises(ValueError, match="holds no average"):
        load_model(tmp_path / "none", ema=True)


def test_a_checkpoint_is_a_teacher(config, tmp_path):
    Trainer(config("teacher")).run()
    options = {"teacher": str(tmp_path / "teacher"), "own": 1.0, "norm_target": "l2", "loss": "absolute"}
    Trainer(config(objective="distill", objective_options=options)).run()
    saved = load_file(tmp_path / "run" / "final" / "objective.safetensors")
    assert sorted(saved) == ["projections.0.bias", "projections.0.weight"], "the teacher is not saved"
    with pytest.raises(ConfigError, match=r"objective distill: .*nowhere"):
        Trainer(config("other", objective="distill", objective_options={"teacher": "nowhere"})).run()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_distil_as_one_does(config, photos, tmp_path, parallel):
    settings = {**DISTILL, "dtype": "float64", "reconstruct_every": 12}
    Trainer(config("one", **settings)).run()
    launch(config("two", parallel=parallel, **settings), processes=2)
    for ours, theirs in zip(curve(tmp_path / "two"), curve(tmp_path / "one")):
        assert ours == pytest.approx(theirs, rel=1e-9)
    for name in ("model", "objective", "ema"):
        ours, theirs = (load_file(tmp_path / run / "final" / f"{name}.safetensors") for run in ("two", "one"))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-7, atol=1e-9) for key in ours)


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, grid",
    [
        ({"kind": "random", "mask_ratio": 0.75}, (4, 4)),
        ({"kind": "cells", "cell": 2, "mask_ratio": 0.5}, (4, 4)),
        ({"kind": "blocks", "num_masked": 7}, (4, 4)),
        ({"kind": "tube", "mask_ratio": 0.5, "decode": "running_cell", "decode_ratio": 0.5}, (4, 4, 4)),
        ({"kind": "weighted", "mask_ratio": 0.5, "remove": True}, (4, 4)),
        ({"kind": "hardest", "mask_ratio": [0.25, 0.75], "share": [0, 0.5]}, (4, 4)),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_masks_are_functions_of_seed_and_progress(settings, grid):
    masks = Masks(settings, grid)
    seeds, scores = torch.arange(5), torch.rand(5, 16 if len(grid) == 2 else 64)
    scores = scores if masks.ranks else None
    mask, part = masks(seeds, 0.5, scores), masks(seeds[2:4], 0.5, None if scores is None else scores[2:4])
    assert torch.equal(mask.ids_keep[2:4], part.ids_keep) and torch.equal(mask.ids_predict[2:4], part.ids_predict)
    assert masks.scheduled == (settings["kind"] == "hardest")
    if masks.scheduled:
        assert [masks(seeds, at, scores).len_keep for at in (0, 1)] == [12, 4]
    assert masks.counts == (masks(seeds, 0.0, scores).len_keep, masks(seeds, 0.0, scores).ids_predict.shape[1])


def test_the_setting_of_a_mask_changes_the_run(config, tmp_path):
    for name, mask in (("plain", {}), ("same", {"kind": "random", "mask_ratio": 0.75}), ("cells", None)):
        mask = {"kind": "cells", "cell": 2, "mask_ratio": 0.75} if mask is None else mask
        Trainer(config(name, mask=mask)).run()
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "same") != outcome(tmp_path / "cells")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": {"kind": "spiral"}}, "mask.kind must be one of random, cells"),
        ({"mask": {"kind": "cells", "mask_ratio": 0.5}}, "cells.*missing.*cell"),
        ({"mask": {"kind": "cells", "cell": 3, "mask_ratio": 0.5}}, "cell"),
        ({"mask": {"mask_ratio": 1.5}}, "mask_ratio must be"),
        ({"mask": {"mask_ratio": [0.5, 0.6, 0.7]}}, r"a number, or \[first, last\]"),
        ({"mask": {"mask_ratio": 0.5, "seeds": 1}}, "no option 'seeds'"),
        ({"mask": {"kind": "hardest", "mask_ratio": 0.5, "share": 0.5}}, "needs an objective with scores"),
        ({"objective": "mae", "objective_options": {"own": 1}}, "objective_options must be empty"),
        ({"objective": "nonsense"}, 'objective must be "mae", "distill" or'),
        ({"objective": "no.such:Thing"}, "can't be imported"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
    ],
)
def test_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config.of({"data": "x", "output_dir": "y", **SETTINGS, **changes})


def test_an_objective_without_scores_says_so(config):
    with pytest.raises(TypeError, match="must define scores"):
        mask = {"kind": "hardest", "mask_ratio": 0.5, "share": 0.5}
        Trainer(config(mask=mask, objective="fastmim.train.objective:PixelObjective")).run()
