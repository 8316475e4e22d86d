"""Characteristic properties of the recipes for speech, series, tables and text."""

import pytest
import torch
import torch.nn.functional as F

from fastmim import masking


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- speech ----------------------------------------------------------------------------------------------------------


def test_tera_alters_spans(recipe):
    model = recipe("tera").TERA(frames=140, bins=6, band=0)
    speech = torch.randn(600, 6, 140)
    altered, chosen = model.alter(speech)
    frames = chosen.all(1)
    assert torch.equal(chosen.any(1), frames)
    # 3 spans of 7 frames, which may overlap, so that no run is shorter
    assert frames.sum(1).max() == 21 and frames.sum(1).min() >= 9
    runs = [run for row in frames.int().tolist() for run in "".join(map(str, row)).split("0") if run]
    assert min(map(len, runs)) == 7
    noisy = (altered != speech).masked_fill(chosen, False).flatten(1).any(1)
    assert 0.1 < noisy.float().mean() < 0.2
    clean, chosen, speech = altered[~noisy], chosen[~noisy], speech[~noisy]
    zeros = ((clean == 0) | ~chosen).flatten(1).all(1)
    same = (clean == speech).flatten(1).all(1)
    assert 0.75 < zeros.float().mean() < 0.85 and 0.06 < same.float().mean() < 0.14
    replaced = clean[~zeros & ~same][0]
    source = speech[~zeros & ~same][0]
    assert all((frame[:, None] == source).all(0).any() for frame in replaced.T)


def test_tera_hides_a_band_of_frequencies(recipe):
    model = recipe("tera").TERA(frames=56, bins=16, band=4)
    speech = torch.rand(300, 16, 56) + 1
    altered, chosen = model.alter(speech)
    bands = chosen.all(2)
    assert set(bands.sum(1).tolist()) == {0, 1, 2, 3, 4}
    first, last = bands.float().argmax(1), 15 - bands.flip(1).float().argmax(1)
    assert (bands.sum(1) == last - first + 1)[bands.any(1)].all()
    assert altered[bands].abs().max() < 1.5  # 0, or noise


def test_tera_scores_altered_cells(recipe):
    model, (speech,) = recipe("tera").example()
    altered, chosen = model.alter(speech)
    model.alter = lambda _: (altered, chosen)
    expected = (model.head(model.encoder(altered)).mT - speech).abs()[chosen].mean()
    torch.testing.assert_close(model(speech), expected)


def test_w2v_bert_takes_targets_from_frames_it_does_not_see(recipe):
    model, (speech,) = recipe("w2v_bert").example()
    mask = masking.cells(len(speech), (14,), 2, 0.5)
    removed = mask.mask.repeat_interleave(4, 1)[:, None]
    other = torch.where(removed, speech.flip(2), speech)
    assert torch.equal(model.model.encode(speech, mask), model.model.encode(other, mask))
    assert not torch.equal(model.targets(speech, mask), model.targets(other, mask))


def test_w2v_bert_leaves_out_distractors_with_the_same_code(recipe):
    model, _ = recipe("w2v_bert").example()
    context = torch.randn(2, 6, 48)
    codes = torch.tensor([[0, 1, 1, 2, 0, 3], [0, 1, 2, 3, 4, 5]])
    picked = F.one_hot(codes, 8).float()
    found = []
    for row in range(2):
        for frame in range(6):
            others = [k for k in range(6) if codes[row, k] != codes[row, frame]]
            vectors = model.codebook[codes[row, [frame, *others]]]
            scores = F.cosine_similarity(context[row, frame], vectors, dim=-1) / 0.1
            found.append(-scores.log_softmax(0)[0])
    torch.testing.assert_close(model.contrast(context, picked), torch.stack(found).mean())


def test_w2v_bert_trains_the_codebook_by_the_contrast_alone(recipe, monkeypatch):
    model, batch = recipe("w2v_bert").example()
    model(*batch).backward()
    assert model.codebook.grad.abs().sum() > 0 and model.quantizer.weight.grad.abs().sum() > 0
    model.zero_grad()
    monkeypatch.setattr(model, "contrast", lambda context, picked: context.sum())
    monkeypatch.setattr(F, "gumbel_softmax", lambda scores, **_: scores.detach())
    monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, _: torch.full_like(scores, 1 / 8))
    model(*batch).backward()
    assert model.codebook.grad is None and model.quantizer.weight.grad is None


def test_maskgct_masks_tokens_after_the_prompt_alone(recipe):
    model, (_, free, valid) = recipe("maskgct").example()
    mask = model.draw(free, valid)
    assert torch.equal(mask.mask & free, torch.zeros_like(free).scatter(1, mask.ids_predict, mask.valid_predict))
    assert not (mask.mask & valid & ~free).any()
    share = mask.ids_predict.shape[1] / model.most
    counts = mask.valid_predict.sum(1)
    assert (counts >= 1).all() and (counts - share * free.sum(1)).abs().max() <= 2
    assert mask.ids_keep.shape[1] + mask.ids_predict.shape[1] == 24


def test_maskgct_masks_more_than_half_on_average(recipe):
    """Compare with the mean of sin(πt/2) over t, which is 2/π; half a token more, as counts are rounded up."""
    model = recipe("maskgct").MaskGCT(100, 4, 4, most=50)
    free = (torch.arange(100) >= 50)[None]
    counts = torch.tensor([int(model.draw(free, torch.ones_like(free)).valid_predict.sum()) for _ in range(300)])
    assert abs(counts.float().mean() / 50 - 2 / torch.pi - 0.01) < 0.06
    assert counts.min() < 10 and counts.max() == 50


def test_maskgct_scores_masked_tokens_without_seeing_them(recipe):
    model, (tokens, free, valid) = recipe("maskgct").example()
    mask = model.draw(free, valid)
    loss = model(tokens, free, valid, mask)
    padding = torch.where(valid, tokens, 3)
    assert not torch.equal(padding, tokens) and torch.equal(model(padding, free, valid, mask), loss)
    masked = torch.where(mask.mask & free, (tokens + 1) % 12, tokens)
    assert not torch.equal(model(masked, free, valid, mask), loss)
    known = mask.valid_predict[..., None]
    assert torch.equal(model.predict(masked, mask) * known, model.predict(tokens, mask) * known)
    prompt = torch.where(valid & ~mask.mask, (tokens + 1) % 12, tokens)
    assert not torch.equal(model.predict(prompt, mask) * known, model.predict(tokens, mask) * known)


# ---- series ----------------------------------------------------------------------------------------------------------


def test_tsmixer_masked_patches_are_zeros(recipe):
    module = recipe("tsmixer")
    model, (series,) = module.example()
    torch.nn.init.normal_(model.embed.proj.bias)
    series = module.scaled(series)
    mask = masking.random(len(series), 12, 0.5)
    zeroed = series.masked_fill(mask.mask.repeat_interleave(8, 1)[:, None], 0)
    dense = model.head(model.blocks(model.embed(zeroed, torch.arange(12).expand(len(series), -1))))
    expected = dense.take_along_dim(mask.ids_predict[..., None], 1)
    torch.testing.assert_close(model.predict(series, mask), expected, rtol=1e-4, atol=1e-5)
    target = series.view(-1, 12, 8).take_along_dim(mask.ids_predict[..., None], 1)
    torch.testing.assert_close(model(series, mask), (expected - target).square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tsmixer", "patchtst"])
def test_channels_are_series_of_their_own(recipe, name):
    model, (series,) = recipe(name).example()
    mask = masking.random(24, 12, 0.5)
    loss = model(series, mask)
    torch.testing.assert_close(model(40 * series - 7, mask), loss, rtol=1e-3, atol=1e-4)
    # the same series, as channels of one sample
    torch.testing.assert_close(model(series.reshape(1, 24, -1), mask), loss)
    assert (model(series + torch.randn_like(series), mask) - loss).abs() > 1e-3


def test_patchtst_sees_no_masked_patch(recipe, tokens_of):
    model, (series,) = recipe("patchtst").example()
    blocks = tokens_of(model.blocks[0])
    drawn = []
    model._draw = lambda *args: drawn.append(args) or masking.random(24, 12, args[1])
    model(series)
    assert drawn[0][1] == 0.4 and blocks == [12]
    mask = masking.random(24, 12, 0.4)
    x = recipe("patchtst").scaled(series)
    other = x.masked_fill(mask.mask.repeat_interleave(8, 1)[:, None], 5)
    assert torch.equal(model.predict(x, mask), model.predict(other, mask))


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_t_jepa_predicts_columns_outside_the_context(recipe, tokens_of):
    model, (rows,) = recipe("t_jepa").example()
    encoder, average, predictor = (
        tokens_of(blocks[0]) for blocks in (model.model.blocks, model.average.blocks, model.model.decoder_blocks)
    )
    masks = model.draw(len(rows))
    model(rows, masks)
    assert encoder == [1 + 4] and average == [1 + 12] and predictor == [1 + 4 + 3] * 3
    for mask in masks:
        assert mask.mask.gather(1, mask.ids_predict).all() and torch.equal(mask.ids_keep, masks[0].ids_keep)
    outside = torch.where(masks[0].mask, 9.0, rows)
    assert torch.equal(model.model.encode(outside, masks[0]), model.model.encode(rows, masks[0]))


def test_t_jepa_targets_are_an_average_without_gradient(recipe):
    model, (rows,) = recipe("t_jepa").example()
    masks = model.draw(len(rows))
    loss = model(rows, masks)
    with torch.no_grad():
        states = model.average.encode(rows)[:, 1:]
        latent = model.model.encode(rows, masks[0])
        each = [model.model.decode(latent, m) - states.take_along_dim(m.ids_predict[..., None], 1) for m in masks]
    torch.testing.assert_close(loss, torch.stack(each).square().mean())
    loss.backward()
    assert all(p.grad is None for p in model.average.parameters())
    before = model.average.norm.bias.clone()
    with torch.no_grad():
        model.model.norm.bias.add_(1)
    model.after_update()
    torch.testing.assert_close(model.average.norm.bias, before + 0.01)


def test_tip_missing_cells_have_no_influence(recipe):
    model, (images, cells, known) = recipe("tip").example()

    def loss(cells, known=known):
        torch.manual_seed(1)
        return model(images, cells, known)

    assert cells.isnan().any() and loss(cells).isfinite()
    assert torch.equal(loss(cells), loss(cells.where(known, 2)))
    assert loss(cells) != loss(cells.nan_to_num(0) + known * F.one_hot(torch.tensor(9), 10))
    # attention would see a missing cell, a zero, if it were a key
    assert loss(cells) != loss(cells.nan_to_num(0), known=torch.ones_like(known))


def test_tip_restores_known_cells_it_does_not_see(recipe):
    model, (_, cells, known) = recipe("tip").example()
    cells = cells.where(known, 0)
    mask = masking.random(8, 10, 0.3, valid=known)
    masked = torch.zeros_like(known).scatter(1, mask.ids_predict, mask.valid_predict)
    assert (masked <= known).all() and masked.any(1).all()
    states, keys = model.encode(cells, known, mask)
    others = model.encode(torch.where(masked, 1.0, cells), known, mask)[0]
    assert torch.equal(states[keys], others[keys])
    given = []
    encode = model.encode
    model.encode = lambda *args: given.append(args) or encode(*args)
    model.restore(torch.randn(8, 65, 32), cells, known)
    drawn = given[0][2]
    assert known.gather(1, drawn.ids_predict)[drawn.valid_predict].all()


def test_tip_negatives_are_tables_of_others(recipe, monkeypatch):
    module = recipe("tip")
    model, _ = module.example()
    patches = whole = torch.eye(8, 32)[:, None].repeat(1, 11, 1)  # all others are as much unlike
    pairs = []
    monkeypatch.setattr(module, "run_blocks", lambda blocks, norm, x, **_: pairs.append(x) or torch.zeros(16, 11, 2))
    model.match(patches, whole, torch.ones(8, 11, dtype=torch.bool))
    assert torch.equal(pairs[0][:8], whole) and not (pairs[0][8:] == whole).all((1, 2)).any()


# ---- text ------------------------------------------------------------------------------------------------------------


def test_vega_v2_masks_the_tokens_it_predicts_worst(recipe):
    model, (text,) = recipe("vega_v2").example()
    mask, believed = model.question(text)
    logits = model.encode(text) @ model.decoder_pred.weight.T + model.decoder_pred.bias
    losses = F.cross_entropy(logits.mT, text, reduction="none")
    assert (mask.mask.sum(1) == 24 - int(24 * 0.85)).all()
    assert (losses.masked_fill(~mask.mask, 99).amin(1) >= losses.masked_fill(mask.mask, -99).amax(1)).all()
    expected = logits.softmax(-1).take_along_dim(mask.ids_predict[..., None], 1)
    torch.testing.assert_close(believed, expected.detach(), rtol=1e-4, atol=1e-5)
    assert not believed.requires_grad


def test_vega_v2_smooths_labels_by_what_it_believed(recipe):
    model, (text,) = recipe("vega_v2").example()
    mask, believed = model.question(text)
    words = text.gather(1, mask.ids_predict)
    labels = model.labels(words, believed)
    torch.testing.assert_close(labels, 0.9 * F.one_hot(words, 12) + 0.1 * believed)
    expected = -(labels * model.predict(text, mask).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(model(text), expected)
    masked = torch.where(mask.mask, (text + 1) % 12, text)
    assert torch.equal(model.predict(masked, mask), model.predict(text, mask))
