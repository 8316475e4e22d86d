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


def test_self_distillation_teaches_on_visible_patches(recipe, tokens_of):
    model, (images,) = recipe("self_distillation").example()
    student, teacher = tokens_of(model.distill.model.blocks[0]), tokens_of(model.distill._teacher[0].blocks[0])
    model(images).backward()
    assert student == teacher == [17]
    assert model.distill.model.decoder_pred.weight.grad is not None  # its own loss too


def test_data2vec_teacher_follows_the_student(recipe):
    model, (images,) = recipe("data2vec").example()
    average, student = model.distill.average.blocks[0].mlp.fc1.weight, model.distill.model.blocks[0].mlp.fc1.weight
    model(images).backward()
    assert average.grad is None and student.grad is not None
    with torch.no_grad():
        student += 1
    before = average.clone()
    model.after_update()
    torch.testing.assert_close(average - before, torch.full_like(average, 0.01), rtol=0, atol=1e-5)


def test_i_mae_teacher_sees_the_weak_image_at_the_students_patches(recipe, tokens_of):
    model, (images, others) = recipe("i_mae").example()
    counts = tokens_of(model.teacher.blocks[0])
    seen = []
    model.teacher.encode = lambda x, mask, encode=model.teacher.encode: seen.append((x, mask)) or encode(x, mask)
    drawn = []
    model.model.decode = lambda latent, mask, decode=model.model.decode: drawn.append(mask) or decode(latent, mask)
    model(images, others).backward()
    assert counts == [17] and seen[0][0] is images and seen[0][1] is drawn[0]
    # the strong image is reconstructed too
    assert model.model.decoder_pred.weight.grad[48:].abs().sum() > 0


def test_mask_align_keeps_attended_patches_and_reconstructs_nothing(recipe, tokens_of):
    model, (images,) = recipe("mask_align").example()
    attended = torch.full((8, 64), 1e-9)
    attended[:, ::4] = 1.0
    targets, _ = model.targets(images)
    model.targets = lambda _: (targets, attended)
    kept = []
    encode = model.student.encode
    model.student.encode = lambda x, mask, **options: kept.append(mask.ids_keep) or encode(x, mask, **options)
    counts = tokens_of(model.student.blocks[0])
    model(images).backward()
    assert kept[0].shape == (8, 19) and counts == [20]
    assert all(set(range(0, 64, 4)) <= set(row) for row in kept[0].tolist())
    assert all(p.grad is not None for name, p in model.student.named_parameters() if name != "pos_embed")
    assert all(p.grad is None for p in model.teacher.parameters())


def test_gmml_replaces_blocks_and_scores_them_alone(recipe):
    module = recipe("gmml")
    model, (images,) = module.example()
    damaged, mask = module.corrupt(images, 4)
    changed = model.encoder.patch_embed(damaged) != model.encoder.patch_embed(images)
    assert torch.equal(changed.any(2), mask.mask)
    assert 32 <= mask.mask[0].sum() <= 48
    module.corrupt = lambda *_: (damaged, mask)
    replaced = mask.mask.view(8, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    loss = model(images)
    assert torch.equal(model(torch.where(replaced, images, 9.0)), loss)
    assert model(torch.where(replaced, 9.0, images)) > 2 * loss


def test_mmc_student_sees_the_damaged_image_and_its_average_the_clean_one(recipe):
    model, (images,) = recipe("mmc").example()
    seen = {}
    for name in ("student", "average"):
        encoder = getattr(model, name)["encoder"]
        encoder.encode = lambda x, name=name, encode=encoder.encode: seen.update({name: x}) or encode(x)
    model(images).backward()
    assert seen["average"] is images and not torch.equal(seen["student"], images)
    assert all(p.grad is None for p in model.average.parameters())
    assert all(head.weight.grad.abs().sum() > 0 for head in (model.pixels, model.student["patches"]))


def test_mimco_contrasts_removed_patches_with_a_frozen_teacher(recipe, monkeypatch):
    module = recipe("mimco")
    model, (images,) = module.example()
    compared, info_nce = [], module.losses.info_nce
    monkeypatch.setattr(
        module.losses, "info_nce", lambda *pair, **given: compared.append(pair) or info_nce(*pair, **given)
    )
    model(images).backward()
    # 10 of 16 cells of 4 patches, of 8 images; and the images
    assert [q.shape for q, _ in compared] == [k.shape for _, k in compared] == [(8 * 40, 32), (8, 32)]
    assert not any(k.requires_grad for _, k in compared) and model.student.mask_token.grad.abs().sum() > 0


def test_cae_aligns_masked_latents_with_targets_without_gradient(recipe, tokens_of):
    model, (images,) = recipe("cae").example()
    encoder, decoder = tokens_of(model.encoder.blocks[0]), tokens_of(model.decoder[0])
    loss = model(images)
    loss.backward()
    assert encoder == [33, 33] and decoder == [32]  # visible, then removed patches; the latter alone are decoded
    mask = recipe("cae").masking.blocks(8, (8, 8), 32)
    latents, codes = model.targets(images, mask)
    assert not latents.requires_grad and latents.shape == (8, 32, 32) and codes.shape == (8, 32)
    # they are of the removed patches, whatever the visible ones hold
    blank = torch.where(mask.mask.view(8, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3), images, 0.0)
    torch.testing.assert_close(model.targets(blank, mask)[0], latents)
