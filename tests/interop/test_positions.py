"""Position tables: on which grid a checkpoint's lie, and how they come to another."""

import pytest
import torch
import torch.nn.functional as F
from small import HEADS, build, same_bits, weights_of

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
    """16 patches may be 4 by 4 or 2 by 8: only the table tells."""
    size = (grid[0] * 8, grid[1] * 8)
    weights = weights_of(build(img_size=size).to(dtype))
    # a fine-tuned encoder's table is learnt
    weights["pos_embed"] = torch.randn_like(weights["pos_embed"])
    torch.save(weights, file)
    for given in (dict(), dict(img_size=size)):
        ours = load(file, **HEADS, **given)
        assert ours.patch_embed.grid_size == grid and same_bits(ours, weights)


def test_a_learnt_table_is_square_unless_told(file):
    weights = weights_of(build())
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = torch.randn_like(weights[name])
    torch.save(weights, file)
    assert load(file, **HEADS).patch_embed.grid_size == (4, 4)
    told = load(file, **HEADS, grid_size=(2, 8))
    assert told.patch_embed.img_size == (16, 64) and same_bits(told, weights)


def test_a_grid_that_nothing_tells_is_asked_for(file):
    weights = weights_of(build(img_size=(16, 24)))
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = torch.randn_like(weights[name])
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"grid of its 6 positions: give grid_size=\(rows, columns\)"):
        load(file, **HEADS)
    assert same_bits(load(file, **HEADS, img_size=(16, 24)), weights)
    assert load(file, **HEADS, grid_size=(3, 2), img_size=(48, 48)).pos_embed.shape == (1, 37, 32)
    with pytest.raises(ValueError, match=r"pos_embed must have shape"):
        load(file, **HEADS, img_size=(8, 8))


@pytest.mark.parametrize("value", [0, (0, 4), (1, 2, 3), "44", (2.0, 2)])
def test_a_bad_grid_is_refused(file, value):
    torch.save(weights_of(build()), file)
    with pytest.raises((TypeError, ValueError), match="grid_size"):
        load(file, **HEADS, grid_size=value)
