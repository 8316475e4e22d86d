"""Characteristic properties of the recipes for images that change the encoder, its attention or its input."""

import pytest
import torch


def spread(patches: torch.Tensor) -> torch.Tensor:
    """Return pixels (B, 1, 32, 32) of a value for each patch, (B, 64)."""
    return patches.view(-1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_crate_mae_ties_queries_keys_and_values(recipe):
    module = recipe("crate_mae")
    attn, x = module.TiedAttention(32, 2), torch.randn(2, 5, 32)
    w = attn.project(x).view(2, 5, 2, 16).transpose(1, 2)
    plain = (w @ w.transpose(2, 3) / 4).softmax(-1) @ w
    torch.testing.assert_close(attn(x), attn.out(plain.transpose(1, 2).flatten(2)))
    step = module.Step(32, 2)
    with torch.no_grad():
        step.dictionary.copy_(torch.eye(32))  # nothing is left to code
    torch.testing.assert_close(step(x), (step.norm2(x + step.attn(step.norm1(x))) - 0.05).relu())


def test_crate_mae_encodes_mask_tokens(recipe, tokens_of):
    model, (images,) = recipe("crate_mae").example()
    counts = tokens_of(model.blocks[0])
    model(images).backward()
    assert counts == [65] and model.mask_token.grad.abs().sum() > 0


def test_mp3_reads_the_context_alone_and_no_positions(recipe):
    model, (images,) = recipe("mp3").example()
    context = (torch.arange(64) < 16).expand(8, 64)
    logits = model.classify(images, context)
    other = torch.where(spread(torch.arange(64) == 40) > 0, 5.0, images)
    torch.testing.assert_close(model.classify(other, context)[:, :40], logits[:, :40])
    other = torch.where(spread(torch.arange(64) == 3) > 0, 5.0, images)
    assert (model.classify(other, context) - logits)[:, 10:].abs().max() > 1e-3
    # patches that change places within the context take their logits with them
    moved = images.clone()
    moved[..., :4, :4], moved[..., :4, 4:8] = images[..., :4, 4:8], images[..., :4, :4]
    torch.testing.assert_close(model.classify(moved, context)[:, :2], logits[:, [1, 0]])


def test_selfie_embeds_each_patch_once(recipe, tokens_of):
    model, (images,) = recipe("selfie").example()
    embedded = []
    model.network.register_forward_pre_hook(lambda _, args: embedded.append(len(args[0])))
    pooled = tokens_of(model.blocks[0])
    model(images).backward()
    assert embedded == [16 * 12, 16 * 4] and pooled == [13]  # K patches and the query; M candidates
    ids = torch.arange(16).expand(16, 16)
    alone = model.embed(images * (torch.arange(32) < 8), ids[:, :1])
    torch.testing.assert_close(model.embed(images, ids)[:, :1], alone)


def test_selfie_candidates_are_the_removed_patches(recipe, monkeypatch):
    module = recipe("selfie")
    model, (images,) = module.example()
    asked, embed, mask = [], model.embed, module.masking.random(16, 16, 0.25)
    model.embed = lambda x, ids: asked.append(ids) or embed(x, ids)
    monkeypatch.setattr(module.masking, "random", lambda *_, **__: mask)
    loss = model(images)
    assert asked[0] is mask.ids_keep and asked[1] is mask.ids_predict
    # positions tell which of them is asked for
    with torch.no_grad():
        model.rows += torch.randn(4, 1)
        model.columns += torch.randn(4, 32)
    assert model(images) != loss


def test_hybrid_distill_drops_redundant_tokens_of_all_three(recipe, tokens_of):
    module = recipe("hybrid_distill")
    model, (images,) = module.example()
    student = [tokens_of(block) for block in model.student.blocks]
    teachers = [tokens_of(encoder.blocks[0]) for encoder in (model.masked, model.contrastive)]
    model(images).backward()
    assert student == [[65], [49], [37]] and teachers == [[37], [37]]
    tokens = torch.randn(2, 9, 16)
    tokens[:, 1:5] = tokens[:, 1:2]  # four tokens that are alike; two are dropped
    _, ids = model.drop(tokens, torch.arange(8).expand(2, 8))
    assert all(len(set(row) & {0, 1, 2, 3}) == 2 for row in ids.tolist())


def test_hybrid_distill_compares_the_same_patches(recipe, monkeypatch):
    module = recipe("hybrid_distill")
    model, (images,) = module.example()
    dropped, drop, compared = [], model.drop, []
    model.drop = lambda *args: dropped.append(drop(*args)) or dropped[-1]
    # features that tell their patch
    names = torch.randn(65, 32)
    model.contrastive.encode = lambda x, mask: torch.cat([names[64:].expand(8, 1, 32), names[mask.ids_keep]], 1)
    monkeypatch.setattr(module.F, "smooth_l1_loss", lambda *pair: compared.append(pair[1]) or pair[0].mean())
    model(images)
    expected = torch.nn.functional.layer_norm(names[dropped[-1][1]], (32,))
    torch.testing.assert_close(compared[0], expected)


def test_fsfm_covers_one_region_and_a_share_of_the_others(recipe):
    module = recipe("fsfm")
    _, (_, regions, covered) = module.example()
    removed = module.cover(regions, covered, 0.75).mask
    assert (removed.sum(1) == 48).all()
    shares = [removed[regions == region].view(8, -1).sum(1) for region in range(4)]
    assert (shares[covered] == 16).all()
    assert all(((share == 10) | (share == 11)).all() for region, share in enumerate(shares) if region != covered)


def test_fsfm_average_sees_the_whole_image(recipe, tokens_of):
    model, batch = recipe("fsfm").example()
    seen, whole = tokens_of(model.model.blocks[0]), tokens_of(model.average[0].blocks[0])
    model(*batch).backward()
    assert seen == [17] and whole == [65] and all(p.grad is None for p in model.average.parameters())


def test_mixed_ae_fills_a_row_with_four_sources(recipe, tokens_of):
    model, (images,) = recipe("mixed_ae").example()
    mask = model.draw(8)
    assert mask.len_keep == 16
    assert all(sorted(row) == list(range(64)) for row in mask.ids_keep.view(2, 64).tolist())
    rows, decoded = tokens_of(model.model.blocks[0]), tokens_of(model.model.decoder_blocks[0])
    batch = []
    model.model.blocks[0].register_forward_pre_hook(lambda _, args: batch.append(len(args[0])))
    model(images).backward()
    assert rows == [64] and batch == [2] and decoded == [64]


def test_mixed_ae_attention_stays_within_one_source_where_patches_match(recipe, monkeypatch):
    module = recipe("mixed_ae")
    model, _ = module.example()
    attn, given = model.model.blocks[0].attn, []
    with torch.no_grad():  # queries are keys
        attn.qkv.weight[:64].copy_(torch.eye(32).repeat(2, 1))
        attn.qkv.bias.zero_()
    attention = module.ops.attention
    monkeypatch.setattr(module.ops, "attention", lambda *qkv, bias: given.append(bias) or attention(*qkv, bias=bias))
    source = torch.arange(64) // 16
    directions = torch.zeros(64, 32)
    directions[torch.arange(64), source] = directions[torch.arange(64), 16 + source] = 5.0  # in both heads
    attn((directions + 0.1 * torch.rand(64, 32))[None])
    assert torch.equal(given[0][0] == 0, (source[:, None] == source).expand(2, 64, 64))
    attn(torch.randn(2, 64, 32))
    assert ((given[1] == 0).sum(3) == 16).all()  # and L / 4 keys in any case


def test_mixed_ae_contrast_is_lower_where_sources_match(recipe):
    model, _ = recipe("mixed_ae").example()
    alike = torch.randn(1, 4, 32).repeat_interleave(16, 1)
    assert model.contrast(alike) < model.contrast(alike.roll(8, 1)) - 0.1


def test_umd_encodes_each_half_at_its_own_ratio(recipe, tokens_of):
    model, (images,) = recipe("umd").example()
    encoded, decoded = tokens_of(model.model.blocks[0]), tokens_of(model.model.decoder_blocks[0])
    inputs, encode = [], model.model.encode
    model.model.encode = lambda x, mask: inputs.append(x) or encode(x, mask)
    model(images).backward()
    assert encoded == [4 + 16, 4 + 40] and decoded == [68, 68]
    assert torch.equal(inputs[0], images[:4]) and not torch.allclose(inputs[1], images[4:])
    # a noised half also predicts noise: twice the values of a patch, and both have gradients
    grad = model.model.decoder_pred.weight.grad
    assert grad[:48].abs().sum() > 0 and grad[48:].abs().sum() > 0


def test_umd_norms_depend_on_time(recipe):
    model, (images,) = recipe("umd").example()
    found = []
    for time in (1, 900):
        model.time["embedding"] = model.embed_time(torch.full((8,), time))
        found.append(model.model.encode(images))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_tips_pairs_each_class_token_with_its_caption(recipe, monkeypatch):
    module = recipe("tips")
    model, (images, web, synthetic) = module.example()
    compared, info_nce = [], module.losses.info_nce
    monkeypatch.setattr(
        module.losses, "info_nce", lambda *pair, **given: compared.append(pair) or info_nce(*pair, **given)
    )
    model(images, web, synthetic).backward()
    classes = model.student["model"].encode(images)[:, :2]
    for (image, text), token, words in zip(compared, classes.unbind(1), (web, synthetic)):
        torch.testing.assert_close(image, token)
        torch.testing.assert_close(text, model.text(words))
    assert all(p.grad is None for p in model.average.parameters())
    assert model.student["model"].mask_token.grad.abs().sum() > 0


def test_uni4eye_shares_one_trunk(recipe):
    model, (images, volumes) = recipe("uni4eye").example()
    plane, volume = model.model.models[0], model.model.models[2]
    for inputs, own, other in ((images, plane, volume), (volumes, volume, plane)):
        model.zero_grad()
        model.model(inputs).backward()
        assert all(p.grad is not None for p in plane.blocks.parameters()) and plane.blocks is volume.blocks
        assert own.patch_embed.proj.weight.grad is not None and other.patch_embed.proj.weight.grad is None


def test_uni4eye_target_is_the_gradient(recipe):
    sobel = recipe("uni4eye").sobel
    ramp = torch.arange(8.0).expand(2, 1, 6, 8)
    torch.testing.assert_close(sobel(ramp)[..., 1:-1], torch.full((2, 1, 6, 6), 8.0))
    volume = torch.randn(2, 1, 3, 8, 8)
    torch.testing.assert_close(sobel(volume)[:, :, 1], sobel(volume[:, :, 1]))


def test_heuristic_pretraining_has_three_tasks(recipe):
    model, (images, labels) = recipe("heuristic_pretraining").example()
    weight = model.model.blocks[0].attn.qkv.weight
    for task in model.tasks(images, labels):
        (grad,) = torch.autograd.grad(task, weight, retain_graph=True)
        assert grad.abs().sum() > 0
    assert model.tasks(images, 1 - labels)[2] != model.tasks(images, labels)[2]


@pytest.mark.parametrize("ratio, removed", [(0.45, 29), (0.9, 58)])
def test_seit_encodes_as_many_codes_whatever_the_ratio(recipe, tokens_of, monkeypatch, ratio, removed):
    module = recipe("seit")
    model, (codes,) = module.example()
    encoded, decoded = tokens_of(model.encoder.blocks[0]), tokens_of(model.decoder[0])
    scored, entropy = [], module.F.cross_entropy
    monkeypatch.setattr(module.F, "cross_entropy", lambda *pair: scored.append(pair) or entropy(*pair))
    mask = module.masking.random(8, 64, len_keep=38)
    monkeypatch.setattr(module.masking, "random", lambda *_, **__: mask)
    model(codes, ratio)
    # removed codes have no influence on their predictions
    hidden = mask.ids_restore >= 64 - removed
    model(torch.where(hidden, (codes + 5) % 32, codes), ratio)
    assert encoded == [39, 39] and decoded == [65, 65]
    assert len(scored[0][1]) == 8 * removed
    torch.testing.assert_close(scored[0][0], scored[1][0])
    torch.testing.assert_close((scored[0][1] + 5) % 32, scored[1][1])


@pytest.mark.parametrize("index, apart", [(0, True), (1, False)])
def test_satvision_attends_within_windows(recipe, index, apart):
    model, _ = recipe("satvision").example()
    grid = torch.randn(1, 8, 8, 32)
    other = grid.clone()
    other[:, 3, 3] += 1
    changed = (model.attend(grid, index) != model.attend(other, index)).any(3)[0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[(slice(0, 4),) * 2 if apart else (slice(2, 6),) * 2] = True
    assert torch.equal(changed, expected)
    # windows that wrap around do not join opposite borders
    corner = grid.clone()
    corner[:, 0, 0] += 1
    changed = (model.attend(grid, 1) != model.attend(corner, 1)).any(3)[0]
    assert changed[:2, :2].all() and changed.sum() == 4
