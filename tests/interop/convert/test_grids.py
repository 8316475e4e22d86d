"""Grids of a checkpoint's position tables, and interpolation to another grid."""

import pytest
import torch
import torch.nn.functional as F
from small_mae import HEADS, build, is_decoder, same_bits, weights_of

from fastmim import load


@pytest.mark.parametrize("old, new", [((4, 4), (8, 8)), ((4, 4), (2, 6)), ((2, 5), (5, 2)), ((3, 7), (4, 7))], ids=str)
def test_position_tables_are_interpolated_on_the_grid(file, old, new):
    weights = weights_of(build(img_size=(old[0] * 8, old[1] * 8)))
    torch.save(weights, file)
    ours = load(file, **HEADS, img_size=(new[0] * 8, new[1] * 8))
    assert ours.patch_embed.grid_size == new
    for name in ("pos_embed", "decoder_pos_embed"):
        table, found = weights[name][0], ours.state_dict()[name][0]
        assert torch.equal(found[0], table[0])
        for channel in (0, 5, table.shape[1] - 1):
            picture = table[1:, channel].reshape(1, 1, *old)
            expected = F.interpolate(picture, size=new, mode="bicubic", align_corners=False, antialias=False)
            assert torch.allclose(found[1:, channel], expected.flatten(), atol=1e-6)
    assert ours(torch.randn(2, 3, new[0] * 8, new[1] * 8)).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_interpolated_tables_keep_their_dtype(file, dtype):
    weights = weights_of(build().to(dtype))
    torch.save(weights, file)
    wide = {name: value.double() for name, value in weights.items()}
    torch.save(wide, file.with_suffix(".wide"))
    found = load(file, **HEADS, img_size=48).pos_embed
    exact = load(file.with_suffix(".wide"), **HEADS, img_size=48).pos_embed
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=0, atol=0.005 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (3, 12), (6, 6), (1, 16)], ids=str)
def test_the_grid_is_that_of_the_sine_cosine_table(file, grid, dtype):
    """16 patches are 4 by 4 or 2 by 8: only the table shows which."""
    size = (grid[0] * 8, grid[1] * 8)
    weights = weights_of(build(img_size=size).to(dtype))
    # a fine-tuned encoder's table is learnt
    weights["pos_embed"] = torch.randn_like(weights["pos_embed"])
    torch.save(weights, file)
    for given in (dict(), dict(img_size=size)):
        ours = load(file, **HEADS, **given)
        assert ours.patch_embed.grid_size == grid and same_bits(ours, weights)


def test_a_learnt_table_is_assumed_square(file):
    weights = weights_of(build())
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = torch.randn_like(weights[name])
    torch.save(weights, file)
    assert load(file, **HEADS).patch_embed.grid_size == (4, 4)
    given = load(file, **HEADS, grid_size=(2, 8))
    assert given.patch_embed.img_size == (16, 64) and same_bits(given, weights)


def test_an_unknown_grid_must_be_given(file):
    weights = weights_of(build(img_size=(16, 24)))
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = torch.randn_like(weights[name])
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"grid of its 6 positions: pass grid_size=\(rows, columns\)"):
        load(file, **HEADS)
    assert same_bits(load(file, **HEADS, img_size=(16, 24)), weights)
    assert load(file, **HEADS, grid_size=(3, 2), img_size=(48, 48)).pos_embed.shape == (1, 37, 32)
    with pytest.raises(ValueError, match=r"grid of its 6 positions: pass grid_size=\(rows, columns\)"):
        load(file, **HEADS, img_size=(8, 8))


@pytest.mark.parametrize("value", [0, (0, 4), (1, 2, 3), "44", (2.0, 2)])
def test_a_bad_grid_is_refused(file, value):
    torch.save(weights_of(build()), file)
    with pytest.raises((TypeError, ValueError), match="grid_size"):
        load(file, **HEADS, grid_size=value)


# ---- sources of the grid ---------------------------------------------------------------------------------------------


def learnt(grid: tuple[int, int], **changes) -> dict:
    """Weights with random tables, which show no grid."""
    weights = weights_of(build(img_size=(grid[0] * 8, grid[1] * 8), **changes))
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = torch.randn_like(weights[name])
    return weights


@pytest.mark.fault
@pytest.mark.parametrize("decoder", [True, False], ids=["whole", "encoder"])
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 16), (4, 4)], ids=str)
def test_the_grid_of_img_size_is_used_for_as_many_patches(file, caplog, grid, decoder):
    weights = learnt(grid)
    torch.save({name: value for name, value in weights.items() if decoder or not is_decoder(name)}, file)
    allow = {} if decoder else dict(allow_missing="decoder", decoder_embed_dim=16, decoder_depth=1)
    ours = load(file, **HEADS, img_size=(grid[0] * 8, grid[1] * 8), **allow)
    assert torch.equal(ours.pos_embed, weights["pos_embed"]) and ours.patch_embed.grid_size == grid
    if decoder:
        assert same_bits(ours, weights)
    assert "positions" not in caplog.text


@pytest.mark.fault
def test_the_grid_of_img_size_counts_oblong_patches(file):
    weights = weights_of(build(img_size=(16, 32), patch_size=(8, 4)))
    weights["pos_embed"], weights["decoder_pos_embed"] = torch.randn(1, 17, 32), torch.randn(1, 17, 16)
    torch.save(weights, file)
    assert same_bits(load(file, **HEADS, img_size=(16, 32)), weights)


@pytest.mark.fault
@pytest.mark.parametrize("given", [dict(), dict(img_size=48)], ids=str)
def test_an_assumed_grid_is_logged(file, caplog, given):
    torch.save(learnt((2, 8)), file)
    load(file, **HEADS, **given)
    message = "does not give the grid of its 16 positions: 4 by 4 is assumed; pass grid_size=(rows, columns) if not"
    assert f"{file} {message}" in caplog.text
    caplog.clear()
    load(file, **HEADS, **given, grid_size=(2, 8))
    assert not caplog.records


@pytest.mark.fault
def test_a_sine_cosine_table_decides_before_img_size(file):
    """The table's grid is used, although that of `img_size` has as many patches."""
    weights = weights_of(build(img_size=(16, 64)))
    torch.save(weights, file)
    ours = load(file, **HEADS, img_size=32)
    table = weights["pos_embed"][0, 1:].T.reshape(1, 32, 2, 8)
    expected = F.interpolate(table, size=(4, 4), mode="bicubic", align_corners=False)
    assert torch.allclose(ours.pos_embed[0, 1:].T, expected.flatten(2)[0], atol=1e-6)


NO_CLASS = {"pos_embed": torch.randn(1, 16, 32), "decoder_pos_embed": torch.randn(1, 16, 16)}


@pytest.mark.fault
@pytest.mark.parametrize(
    "weights, settings, message",
    [
        (
            learnt((4, 4)), dict(grid_size=(3, 4)),
            r"gives the grid \(3, 4\) of 12 patches, but .* 17 rows: 1 for the class token and 16 for patches$",
        ),
        (
            weights_of(build(img_size=(16, 64))), dict(grid_size=(4, 4)),
            r"grid_size gives the grid \(4, 4\), but pos_embed is the sine-cosine table of \(2, 8\)$",
        ),
        (
            weights_of(build()) | {"decoder_pos_embed": weights_of(build(img_size=(16, 64)))["decoder_pos_embed"]}, {},
            r"sine-cosine tables of different grids: pos_embed of \(4, 4\), decoder_pos_embed of \(2, 8\)$",
        ),
        (
            weights_of(build()) | {"pos_embed": torch.randn(1, 10, 32)}, dict(img_size=32),
            r"decoder_pos_embed must have as many rows as pos_embed, shape \(1, 10, 16\); got \(1, 17, 16\)$",
        ),
        (
            weights_of(build()) | NO_CLASS, {},
            r"the grid of its 15 positions: .* has 16 rows, the first .* \(timm's no_embed_class\) is not supported$",
        ),
        (
            weights_of(build()) | NO_CLASS, dict(grid_size=(4, 4)),
            r"has 16 rows: .* 15 for patches; a table without .* \(timm's no_embed_class\) is not supported$",
        ),
        (
            weights_of(build()) | {"pos_embed": torch.randn(1, 18, 32), "dist_token": torch.ones(1, 1, 32)},
            dict(grid_size=(4, 4), allow_leftover="dist_token"),
            r"decoder_pos_embed must have .* shape \(1, 18, 16\); got \(1, 17, 16\)",
        ),
        (weights_of(build()) | {"pos_embed": torch.randn(1, 17, 32).to_sparse()}, {}, "pos_embed must be dense"),
        (
            weights_of(build()) | {"pos_embed": torch.zeros(1, 17, 32).to(torch.float8_e5m2)}, dict(img_size=48),
            "pos_embed must be .*float8",
        ),
        (weights_of(build()) | {"pos_embed": torch.ones(0, 17, 32)}, {}, r"pos_embed must have .* got \(0, 17, 32\)$"),
    ],
    ids=[
        "another count", "another sine-cosine grid", "two sine-cosine grids", "two counts", "no class token",
        "no class token, given", "two prefix tokens", "sparse", "float8", "no table in it",
    ],
)  # fmt: skip
def test_tables_that_contradict_the_grid_are_refused(file, weights, settings, message):
    torch.save(weights, file)
    with pytest.raises(ValueError, match=message) as caught:
        load(file, **HEADS, **settings)
    assert str(file) in str(caught.value)
