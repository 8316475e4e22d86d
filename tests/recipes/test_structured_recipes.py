"""Characteristic properties of the recipes for graphs, points, volumes and video, and of SparK."""

import pytest
import torch
import torch.nn.functional as F

from fastmim import masking


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_graphmae_scores_masked_nodes_after_remasking(recipe):
    model, (x, adjacency) = recipe("graphmae").example()
    model.noise = 0.0
    mask = masking.random(1, len(x), 0.5)
    masked = mask.ids_predict[0]
    every = torch.arange(len(x))
    hidden = model.encode(model.corrupt(x, masked), adjacency, every)

    def formula(hidden):
        dense = model.decoder(adjacency @ model.encoder_to_decoder(hidden))
        return (1 - F.cosine_similarity(dense[masked], x[masked])).square().mean()

    loss = model(x, adjacency, mask)
    torch.testing.assert_close(loss, formula(hidden.index_fill(0, masked, 0)))
    assert (loss - formula(hidden)).abs() > 1e-4


def test_graphmae_replaces_features_by_the_token_and_by_those_of_other_nodes(recipe):
    model, (x, _) = recipe("graphmae").example()
    torch.nn.init.constant_(model.mask_token, 7)
    masked = torch.randperm(len(x))[:60]
    corrupt = model.corrupt(x, masked)
    assert (corrupt[masked[:54]] == 7).all()
    assert all((row == x).all(1).any() for row in corrupt[masked[54:]])
    visible = torch.ones(len(x), dtype=torch.bool).index_fill(0, masked, False)
    assert torch.equal(corrupt[visible], x[visible])


# ---- points ----------------------------------------------------------------------------------------------------------


def test_point_cmae_compares_groups_that_both_views_mask(recipe):
    agreement = recipe("point_cmae").agreement
    first, second = (masking.random(2, 16, len_keep=7) for _ in range(2))
    states = torch.randn(2, 2, 9, 8)
    found = []
    for row in range(2):
        places = [{int(g): i for i, g in enumerate(mask.ids_predict[row])} for mask in (first, second)]
        for node in places[0].keys() & places[1].keys():
            a, b = states[0, row, places[0][node]], states[1, row, places[1][node]]
            found.append(1 - F.cosine_similarity(a, b, dim=0))
    assert 0 < len(found) < 18
    torch.testing.assert_close(agreement(*states, first, second), torch.stack(found).mean())


def test_point_cmae_encodes_visible_groups_alone(recipe, tokens_of):
    model, batch = recipe("point_cmae").example()
    encoder, decoders = tokens_of(model.encoder.blocks[0]), [tokens_of(d.blocks[0]) for d in model.decoders]
    model(*batch)
    assert encoder == [7, 7] and decoders == [[16], [16]]


def test_i2p_mae_keeps_salient_groups(recipe):
    model, _ = recipe("i2p_mae").example()
    saliency = torch.zeros(64, 16).index_fill(1, torch.tensor([3, 11]), 20.0)
    mask = model.draw(saliency)
    assert not mask.mask[:, [3, 11]].any() and mask.len_keep == 4


def test_i2p_mae_predicts_features_of_visible_groups_and_points_of_masked(recipe, tokens_of):
    model, batch = recipe("i2p_mae").example()
    encoder, features, points = (tokens_of(m) for m in (model.encoder.blocks[0], model.features, model.points))
    model(*batch).backward()
    assert encoder == features == [4] and points == [12]
    assert all(p.grad is None for p in model.teacher.parameters())


def test_i2p_mae_brings_features_back_to_points(recipe, monkeypatch):
    """Two points that share a pixel from one side only have the features of that side in common."""
    model, _ = recipe("i2p_mae").example()
    place = torch.arange(64.0).view(1, 64, 1).expand(3, -1, 4)
    tokens = torch.cat([torch.ones(3, 1, 4), place], 1)
    monkeypatch.setattr(model.teacher, "forward", lambda depth: tokens[: len(depth)])
    features, _ = model.look(torch.tensor([[[-0.99, -0.99, -0.99], [0.99, -0.99, -0.99]]]))
    # the second point is in patch 0 from one side, in the last column from another, in the last row from the third
    assert features[0, 0, 0] == 0
    assert features[0, 1, 0] == pytest.approx((0 + 7 + 56) / 3)


def test_p2c_leaves_points_free_where_nothing_is_observed(recipe):
    module = recipe("p2c")
    points = module.clouds(2, 128)
    centres, groups = module.group(points, 8, 16)
    completed = torch.cat([points, points + 9], 1)
    assert module.region_chamfer(completed, centres, groups).amax() < 1e-9
    assert module.chamfer(completed, points).amin() > 1
    assert module.region_chamfer(completed + 0.1, centres, groups).amin() > 1e-5


def test_p2c_surfaces_are_smooth(recipe):
    module = recipe("p2c")
    ball = torch.randn(1, 64, 3)
    flat = module.inconsistency(ball * torch.tensor([1.0, 1.0, 0.0]))
    assert flat.amax() < 1e-3 and module.inconsistency(ball).mean() > 0.1


def test_p2c_encodes_a_third_and_what_it_made_around_another(recipe, tokens_of):
    """The last third of the groups gives nothing but the places of its centres."""
    model, (points,) = recipe("p2c").example()
    encoder = tokens_of(model.encoder.blocks[0])
    model(points)
    assert encoder == [4, 4]
    module, mask = recipe("p2c"), masking.random(len(points), 12, len_keep=4)
    centres, groups = module.group(points, 12, 16)
    last = mask.ids_predict[:, 4:]
    other = groups.scatter(1, last[:, :, None, None].expand(-1, -1, 16, 3), 7.0)
    made = []
    for given in (groups, other):
        module.group = lambda *_, given=given: (centres, given)
        made.append(model(points, mask))
    assert torch.equal(*made)


# ---- volumes ---------------------------------------------------------------------------------------------------------


def test_nerf_mae_scores_colour_where_there_is_matter(recipe):
    module = recipe("nerf_mae")
    fields = module.read_fields(2)
    mask = masking.cells(2, (8, 8, 8), 2, 0.75)
    pred = torch.randn(2, 384, 32)
    loss = module.field_loss(pred, fields, mask, (2, 2, 2))
    target = module.ops.gather_patches(fields, mask.ids_predict, 3 * (2,)).unflatten(2, (4, -1))
    empty = (target[:, :, 3:] == 0).expand_as(target).clone()
    assert 0.2 < empty.float().mean() < 0.98
    empty[:, :, 3] = False
    in_space = pred.unflatten(2, (4, -1)) + 5 * empty
    torch.testing.assert_close(module.field_loss(in_space.flatten(2), fields, mask, (2, 2, 2)), loss)
    empty[:, :, 3] = True
    density = pred.unflatten(2, (4, -1)) + 5 * empty
    assert module.field_loss(density.flatten(2), fields, mask, (2, 2, 2)) > loss + 1


def test_nerf_mae_sees_no_masked_voxel_but_scores_it(recipe):
    module = recipe("nerf_mae")
    model, (fields,) = module.example()
    mask = masking.cells(len(fields), (8, 8, 8), 2, 0.75)
    removed = mask.mask.view(-1, 1, 8, 8, 8)
    for axis in (2, 3, 4):
        removed = removed.repeat_interleave(2, axis)
    preds = []
    model.decoder.register_forward_hook(lambda _, args, out: preds.append(out))
    losses = [model(f, mask) for f in (fields, fields.masked_fill(removed, 0.7))]
    assert torch.equal(*preds) and losses[0] != losses[1]
    model(fields.masked_fill(~removed, 0.7), mask)
    assert not torch.equal(preds[0], preds[2])


def test_nerf_mae_shifted_windows_do_not_wrap(recipe):
    block = recipe("nerf_mae").Windows(width=8, grid=8, window=4, shift=2)
    x = torch.randn(1, 8, 8, 8, 8)
    moved = x.clone()
    moved[0, 0, 0, 0] = torch.randn(8)
    changed = (block(moved) - block(x)).abs().amax(-1)[0] > 1e-6
    assert changed[:2, :2, :2].all() and changed.sum() == 8


# ---- convolution -----------------------------------------------------------------------------------------------------


def test_spark_norm_is_that_of_visible_pixels(recipe):
    norm, plain = recipe("spark").VisibleNorm(4), torch.nn.BatchNorm1d(4)
    for each in (norm, plain):
        torch.nn.init.uniform_(each.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.constant_(each.bias, 0.5)
    x, visible = torch.randn(3, 4, 5, 5), torch.rand(3, 5, 5) < 0.4
    for _ in range(2):  # training, then with the running moments of it
        found = norm(x, visible[:, None]).movedim(1, -1)[visible]
        torch.testing.assert_close(found, plain(x.movedim(1, -1)[visible]))
        norm.eval(), plain.eval()


@pytest.mark.parametrize("in_chans", [3, 1])
def test_spark_features_see_no_masked_pixel(recipe, in_chans):
    module = recipe("spark")
    model, images = module.SparK(in_chans), module.pictures(4, in_chans)
    mask = model.draw(images)
    assert mask.len_keep == 6  # of 16, 0.4 rounded
    visible = ~mask.mask.view(4, 4, 4)
    pixels = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(pixels, images, torch.nan)
    before = model.encode(images, visible)
    for (one, at), (two, _) in zip(before, model.encode(other, visible)):
        assert torch.equal(one, two)
        assert (one.movedim(1, -1)[~at] == 0).all() and (one.movedim(1, -1)[at] != 0).any()
    shifted = model.encode(torch.where(pixels, images.flip(0), images), visible)
    assert not torch.equal(before[-1][0], shifted[-1][0])


def test_spark_scores_masked_patches(recipe, monkeypatch):
    model, (images,) = recipe("spark").example()
    mask = model.draw(images)
    ids = torch.arange(16).expand(len(images), -1)
    target = recipe("spark").ops.gather_patches(images, ids, 8)
    error = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(model, "decode", lambda maps: torch.zeros_like(images))
    torch.testing.assert_close(model(images, mask), error.square().mean(2)[mask.mask].mean())


# ---- video -----------------------------------------------------------------------------------------------------------


def test_human_like_video_encodes_a_fifth_of_each_frame(recipe, tokens_of):
    model, (clips,) = recipe("human_like_video").example()
    encoder, decoder = tokens_of(model.model.blocks[0]), tokens_of(model.model.decoder_blocks[0])
    outputs = []
    model.model.register_forward_hook(lambda _, args, out: outputs.append(out))
    model(clips, decode_ratio=0.25)
    assert model.model.num_patches == 1156
    assert encoder == [1 + 231] and decoder == [1 + 231 + round(0.25 * (1156 - 231))]
    assert outputs[0].mask.shape == (2, 1156) and not torch.equal(*outputs[0].mask)


def test_cdfsl_v_moves_from_source_to_target(recipe, tokens_of):
    model, (source, labels, target) = recipe("cdfsl_v").example()
    encoder = tokens_of(model.student[0].blocks[0])
    model(source, labels, target)
    assert encoder == [2 * 2]  # 2 of 16 patches of each of 2 frames
    model.second_stage()

    def curriculum(source, labels, target, progress):
        torch.manual_seed(1)
        return model.curriculum(source, labels, target, progress)

    assert curriculum(source, labels, target, 0.0) == curriculum(source, labels, -target, 0.0)
    assert curriculum(source, labels, target, 0.0) != curriculum(source, 1 - labels, target, 0.0)
    assert curriculum(source, labels, target, 1.0) == curriculum(source, 1 - labels, target, 1.0)
    assert curriculum(source, labels, target, 1.0) != curriculum(source, labels, -target, 1.0)
    assert encoder[-1] == 32  # whole clips


def test_cdfsl_v_agrees_with_its_average(recipe):
    module = recipe("cdfsl_v")
    model, batch = module.example()
    model.second_stage()
    before = model.average[1].weight.clone()
    model.step = model.total_steps
    model(*batch).backward()
    assert all(p.grad is None for p in model.average.parameters())
    assert model.student[1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.student[1].weight.add_(1)
    model.after_update()
    torch.testing.assert_close(model.average[1].weight, before + 0.01)
