"""Characteristic properties of the recipes for pairs of views, clips, images and words."""

import torch


def test_mto_weighs_mask_tokens(recipe):
    module = recipe("mto")
    model, (images,) = module.example()
    visible = module.linear(
        model.model.encode(images, mask := module.masking.random(8, 64, 0.75)), model.model.decoder_embed
    )
    half = module.masking.Mask(mask.ids_keep, mask.ids_predict[:, :24], mask.ids_restore, 64)
    # weights of almost 0: patches are predicted from visible ones alone, however many are predicted beside them
    for weight, alone in ((-1e4, True), (2.0, False)):
        model.weights.data.fill_(weight)
        pred, of_half = model.decode(visible, mask)[:, :24], model.decode(visible, half)
        assert torch.allclose(pred, of_half, atol=1e-5) is alone
    model(images).backward()
    assert (model.weights.grad != 0).all()


def test_m3ae_ignores_padding_and_hidden_words(recipe, tokens_of):
    model, (images, words, real) = recipe("m3ae").example()
    seen = []
    model.words.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    counts = tokens_of(model.image.blocks[0])
    torch.manual_seed(1)
    loss = model(images, words, real)
    torch.manual_seed(1)
    torch.testing.assert_close(model(images, words.masked_fill(~real, 3), real), loss)
    hidden = seen[0] == model.mask_id
    lengths = real.sum(1)
    assert torch.equal(hidden.sum(1), lengths - (lengths * 0.85).int()) and not (hidden & ~real).any()
    assert counts == [17, 17]


def test_m3ae_decodes_pixels_from_the_middle(recipe):
    model, batch = recipe("m3ae").example()
    fused, fuse, decoded, decode = [], model.fuse, [], model.image.decode
    model.fuse = lambda *args: fused.append((args, fuse(*args))) or fused[-1][1]
    model.image.decode = lambda latent, mask: decoded.append(latent) or decode(latent, mask)
    model(*batch)
    (latent, text, real), (middle, image, _) = fused[0]
    assert decoded[0] is middle and not torch.allclose(image, middle)
    torch.testing.assert_close(middle, model.to_text[0](latent, memory=text, memory_mask=real))


def test_croma_attention_is_biased_by_distance(recipe, tokens_of):
    module = recipe("croma")
    bias = module.alibi((8, 8), 2)
    torch.testing.assert_close(bias[:, 0, 9], torch.tensor([-(2**-4), -(2**-8)]) * 2**0.5)
    ids = torch.tensor([[9, 0], [1, 2]])
    assert torch.equal(module.pick(bias, ids, ids)[0, 1], bias[1][[9, 0]][:, [9, 0]])
    model, images = module.example()
    counts = [tokens_of(block) for block in (model.encoders[0].blocks[0], model.encoders[1].blocks[0], model.fusion[0])]
    model(*images).backward()
    assert counts == [[16], [16], [16]]


def test_croma_scores_each_image_where_it_is_removed(recipe, monkeypatch):
    module = recipe("croma")
    model, (optical, radar) = module.example()
    gathered, placed = [], []
    gather, unshuffle = module.ops.gather_patches, module.ops.unshuffle
    monkeypatch.setattr(module.ops, "gather_patches", lambda x, ids, p: gathered.append(ids) or gather(x, ids, p))
    monkeypatch.setattr(module.ops, "unshuffle", lambda x, ids, *rest: placed.append(ids) or unshuffle(x, ids, *rest))
    drawn = [module.masking.random(8, 64, 0.75) for _ in range(2)]
    given = iter(drawn)
    monkeypatch.setattr(module.masking, "random", lambda *_, **__: next(given))
    model(optical, radar)
    assert [ids is mask.ids_predict for ids, mask in zip(gathered, drawn)] == [True, True]
    assert placed[0] is drawn[1].ids_restore  # tokens are the radar image's


def test_hicmae_decoder_blocks_read_the_encoders_states(recipe, tokens_of):
    module = recipe("hicmae")
    model, (clips, sounds) = module.example()
    video, audio = tokens_of(model.video.encoder.blocks[0]), tokens_of(model.audio.encoder.blocks[0])
    given = []
    for block in model.video.decoder:
        block.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["memory"]), with_kwargs=True)
    states = []
    encode = model.video.encoder.encode
    model.video.encoder.encode = lambda *args, **taps: states.append(encode(*args, **taps)) or states[-1]
    model(clips, sounds).backward()
    assert video == [8] and audio == [12]  # a quarter of 2 · 16 and a fifth of 64 patches
    assert given[0] is states[0][1][1] and given[1] is states[0][1][0]
    assert all(p.grad is not None for p in model.video.decoder.parameters())


def test_hicmae_target_is_the_difference_within_a_pair(recipe):
    clips = torch.randn(2, 3, 4, 8, 8)
    target = recipe("hicmae").frame_differences(clips)
    assert torch.equal(target[:, :, [0, 2]], clips[:, :, [0, 2]])
    torch.testing.assert_close(target[:, :, [1, 3]], clips[:, :, [1, 3]] - clips[:, :, [0, 2]])


def test_gfslt_vlp_ignores_padding(recipe):
    model, (frames, shown, words, real) = recipe("gfslt_vlp").example()
    torch.manual_seed(1)
    loss = model(frames, shown, words, real)
    torch.manual_seed(1)
    again = model(frames.masked_fill(~shown[..., None], 9.0), shown, words.masked_fill(~real, 3), real)
    torch.testing.assert_close(again, loss)


def test_gfslt_vlp_restores_hidden_words_alone(recipe, monkeypatch):
    module = recipe("gfslt_vlp")
    model, (_, _, words, real) = module.example()
    scored, given, entropy = [], [], module.F.cross_entropy
    monkeypatch.setattr(module.F, "cross_entropy", lambda *pair: scored.append(pair[1]) or entropy(*pair))
    model.words.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model.restore(words, real)
    hidden, lengths = given[0] == model.mask_id, real.sum(1)
    assert torch.equal(hidden.sum(1), lengths - (lengths * 0.7).int()) and not (hidden & ~real).any()
    for row in range(8):
        assert sorted(scored[0][row][scored[0][row] >= 0].tolist()) == sorted(words[row][hidden[row]].tolist())


def test_tgm_removes_what_the_caption_tells(recipe, monkeypatch):
    model, (clips, captions) = recipe("tgm").example()
    scores = model.similarity(clips, captions)
    drawn = []
    monkeypatch.setattr(model.model, "encode", lambda x, m, f=model.model.encode: drawn.append(m) or f(x, m))
    model(clips, captions).backward()
    removed = drawn[0].mask
    assert (removed.sum(1) == 24).all()
    assert (scores.masked_fill(~removed, 2).amin(1) >= scores.masked_fill(removed, -2).amax(1)).all()
    assert all(p.grad is None for p in (*model.look.parameters(), *model.read.parameters()))


def test_cross_video_mae_contrasts_visible_tokens(recipe, monkeypatch, tokens_of):
    module = recipe("cross_video_mae")
    model, (clips,) = module.example()
    video, frame = tokens_of(model.video.blocks[0]), tokens_of(model.frame.blocks[0])
    compared, info_nce = [], module.losses.info_nce
    monkeypatch.setattr(
        module.losses, "info_nce", lambda *pair, **given: compared.append(pair) or info_nce(*pair, **given)
    )
    model(clips).backward()
    assert video == [8, 8] and frame == [16, 16]
    assert len(compared) == 3  # within clips, within frames, between both
    torch.testing.assert_close(compared[2][0], sum(compared[0]) / 2)
    torch.testing.assert_close(compared[2][1], sum(compared[1]) / 2)
