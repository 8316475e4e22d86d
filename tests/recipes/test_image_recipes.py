"""Characteristic properties of the recipes for images."""

import torch


def test_hpm_removes_the_hardest_share(recipe):
    model, (images,) = recipe("hpm").example()
    model.step = model.total_steps
    hard = model.difficulty(images).topk(24).indices  # half of 48 removed patches
    drawn = []
    model.judge.decode = lambda latent, mask: drawn.append(mask) or torch.zeros(*mask.ids_predict.shape, 1)
    model(images)
    assert drawn[0].mask.gather(1, hard).all() and drawn[0].len_keep == 16


def test_hpm_ranks_losses(recipe):
    rank = recipe("hpm").ranking_loss
    losses = torch.tensor([[3.0, 1.0, 2.0]])
    assert rank(4 * losses, losses) < 0.05 < rank(-losses, losses)


def test_color_mae_keeps_the_largest_noise(recipe, monkeypatch):
    model, _ = recipe("color_mae").example()
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor([3, 5]))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.ones(()))  # no mirroring
    noise, removed = model.bank[:, 3:11, 5:13].flatten(1), model.draw(8).mask
    assert (removed.sum(1) == 48).all()
    assert (noise.masked_fill(removed, 9).amin(1) > noise.masked_fill(~removed, -9).amax(1)).all()


def test_color_mae_noise_is_green(recipe):
    """Count the frequencies: white noise has all of them alike, red the lowest, blue the highest."""
    power = torch.fft.fft2(recipe("color_mae").green_noise(64, 32)).abs().square().mean(0)[0, :17]
    assert 2 <= power.argmax() <= 8 and power.max() > 5 * max(power[0], power[16])


def test_mask_distill_predicts_patches_it_has_not_seen(recipe, tokens_of):
    model, (images,) = recipe("mask_distill").example()
    teacher = model.distill._teacher[0]
    student, whole = tokens_of(model.distill.model.blocks[0]), tokens_of(teacher.blocks[0])
    model(images).backward()
    assert student == whole == [65]
    assert all(p.grad is None for p in teacher.parameters())
