"""Changes of colour: torchvision's ColorJitter by plain formulas, and numbers that depend on seed and sample alone."""

import numpy as np
import pytest
import torch
from named import write_pairs
from photos import BACKENDS
from PIL import Image
from test_loader import load

import fastmim
from fastmim.data import ImageLoader
from fastmim.data.crops import BLOCKS, Crops
from fastmim.data.decoders import choose
from fastmim.data.jitter import Jitter, jitter_of
from fastmim.data.pack import pack

NUMBERS = np.random.default_rng(0).random((40, 8))
PICTURE = np.random.default_rng(1).integers(0, 256, (1, 9, 13, 3), dtype=np.uint8)
FOUR = Jitter((0.4, 0.3, 0.5, 0.2))


def grey(x):
    return np.rint(x.astype(float) @ (0.299, 0.587, 0.114))[..., None]


def blended(low, x, factor):
    return np.clip(low + factor * (x.astype(float) - low), 0, 255).astype(np.uint8)


def turned(x, amount):
    """Turn the hue as a colour circle of 256 steps."""
    values = np.array(Image.fromarray(x).convert("HSV"))
    values[..., 0] = (values[..., 0].astype(int) + int(amount * 255)) % 256
    return np.asarray(Image.fromarray(values, "HSV").convert("RGB"))


PLAIN = {
    "brightness": lambda x, factor: blended(0.0, x, factor),
    "contrast": lambda x, factor: blended(np.floor(grey(x).mean() + 0.5), x, factor),
    "saturation": lambda x, factor: blended(grey(x), x, factor),
    "hue": turned,
}


@pytest.mark.parametrize("number", range(12))
def test_changes_are_the_formulas(number):
    found, expected = PICTURE.copy(), PICTURE[0]
    FOUR.recolour(found, NUMBERS[number : number + 1])
    for change, amount in FOUR.changes(NUMBERS[number]):
        step = PLAIN[change](expected, amount)
        # the next change starts from Pillow's result, so that errors of a rounding do not add up
        alone = Jitter(tuple(span * (name == change) for name, span in zip(PLAIN, FOUR.spans)))
        made = expected[None].copy()
        alone.recolour(made, NUMBERS[number : number + 1])
        assert np.abs(made[0].astype(int) - step).max() <= 1
        expected = made[0]
    assert np.array_equal(found[0], expected) and not np.array_equal(found[0], PICTURE[0])


def test_equals_torchvision():
    try:
        from torchvision.transforms import functional
    except (ImportError, RuntimeError) as error:  # beside a CPU build of torch its import fails
        pytest.skip(str(error))
    for numbers in NUMBERS:
        image, found = Image.fromarray(PICTURE[0]), PICTURE.copy()
        for change, amount in FOUR.changes(numbers):
            image = getattr(functional, f"adjust_{change}")(image, amount)
        FOUR.recolour(found, numbers[None])
        assert np.array_equal(found[0], np.asarray(image))


def test_amounts_and_orders():
    """Factors are uniform on both sides of 1, turns around 0, and all 24 orders appear."""
    numbers = np.random.default_rng(2).random((4000, 8))
    drawn = [list(FOUR.changes(own)) for own in numbers]
    assert len({tuple(change for change, _ in changes) for changes in drawn}) == 24
    for change, span in zip(PLAIN, FOUR.spans):
        low, high = (-span, span) if change == "hue" else (1 - span, 1 + span)
        amounts = np.array([amount for changes in drawn for name, amount in changes if name == change])
        assert len(amounts) == 4000 and low <= amounts.min() < low + 0.01 and high - 0.01 < amounts.max() < high
        assert abs(amounts.mean() - (low + high) / 2) < 0.02
    assert all(amount > 0 for own in numbers for change, amount in Jitter((2.0, 0, 0, 0)).changes(own))
    assert [name for name, _ in Jitter((0.1, 0, 0, 0)).changes(numbers[0])] == ["brightness"]


# ---- the loader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*BACKENDS, "packed", "inner", "pairs", "packed pairs"])
def test_each_crop_has_numbers_of_its_own(photographs, tmp_path, kind):
    """Crops are those of a loader without changes of colour, then changed by numbers of their sample and view."""
    source, options = photographs, {"backend": kind if kind in BACKENDS else "pillow"}
    if "pairs" in kind:
        source = write_pairs(photographs, tmp_path / "pairs.txt", {})
    if "packed" in kind:
        pack(source, tmp_path / "packed", short_side=64, num_threads=2)
        source, options = tmp_path / "packed", {}
    if kind == "inner":
        options["inner"] = (0.3, 0.6)
    views = ("images", "pair") if kind in ("inner", "pairs", "packed pairs") else ("images",)
    options |= {"repeats": 2, "seed": 5, "drop_last": False}
    plain, ours = load(source, **options), load(source, color_jitter=0.4, **options)
    crops, seen = ours.crops, []
    for a, b in zip(plain, ours, strict=True):
        for row, sample in enumerate(a.ids.tolist()):
            draws = crops.draws(5, 0, np.array([sample]))[0].reshape(2, len(views), -1)
            for view, name in enumerate(views):
                pixels = getattr(a, name)[row].permute(1, 2, 0).numpy()[None].copy()
                numbers = draws[row % 2, view, None, 4 * BLOCKS :]
                seen.append(tuple(numbers[0]))
                Jitter((0.4, 0.4, 0.4, 0.0)).recolour(pixels, numbers)
                assert np.array_equal(getattr(b, name)[row].permute(1, 2, 0).numpy(), pixels[0])
    assert len(set(seen)) == len(seen)


def test_threads_shards_and_resuming_change_nothing(photographs):
    def images(loader):
        return [batch.images for batch in loader]

    options = {"color_jitter": (0.4, 0.4, 0.4, 0.1)}
    alone = images(load(photographs, 6, num_threads=1, **options))
    halves = [images(load(photographs, 3, shard=(rank, 2), num_threads=3, **options)) for rank in range(2)]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(alone, *halves, strict=True))
    first, again = (load(photographs, 6, **options) for _ in range(2))
    for _ in zip(range(2), first):
        pass
    state = first.state_dict()
    again.load_state_dict(state)
    assert all(map(torch.equal, images(again), alone[2:]))
    with pytest.raises(ValueError, match=r"color_jitter was \[0.4, 0.4, 0.4, 0.1\], is None"):
        load(photographs, 6).load_state_dict(state)
    # a state of an earlier version
    del (old := load(photographs, 6).state_dict())["of"]["color_jitter"]
    load(photographs, 6).load_state_dict(old)


@pytest.mark.parametrize(
    "value, error, message",
    [
        ("0.4", TypeError, "color_jitter must be a number, or three or four: brightness, contrast, .* got str '0.4'"),
        ((0.4, True, 0.4), TypeError, "color_jitter must be a number, or three or four"),
        ((0.4, 0.4), ValueError, r"must have three or four numbers, .*; got \(0.4, 0.4\)"),
        (-0.1, ValueError, "must be finite and at least 0, its hue at most 0.5; got -0.1"),
        (float("inf"), ValueError, "must be finite"),
        ((0, 0, 0, 0.6), ValueError, "its hue at most 0.5"),
    ],
)
def test_wrong_numbers(photographs, value, error, message):
    with pytest.raises(error, match=message):
        ImageLoader(photographs, 4, color_jitter=value)


def test_what_can_not_be_served(photographs, monkeypatch):
    def draw(seeds):
        return fastmim.masking.random(len(seeds), 4, 0.5, seeds=seeds)

    with pytest.raises(ValueError, match="color_jitter must be None with patch_size: contrast takes the mean of whole"):
        load(photographs, patch_size=16, masking=draw, color_jitter=0.4)
    assert jitter_of(None) is None and jitter_of(0) is None
    assert choose("auto", torch.device("cuda"), "color_jitter") != "dali"
    with pytest.raises(ValueError, match="backend must be another than 'dali' with color_jitter: on a GPU"):
        monkeypatch.setattr("fastmim.data.decoders.installed", lambda name: True)
        choose("dali", torch.device("cuda"), "color_jitter")
    monkeypatch.setattr("fastmim.data.jitter.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="color_jitter needs Pillow: pip install"):
        jitter_of(0.4)
    crops = Crops((8, 8), (0.2, 1.0), (1, 1), True, 1, jitter=FOUR)
    plain = Crops((8, 8), (0.2, 1.0), (1, 1), True, 1)
    with_colours, without = (c.boxes(c.draws(1, 0, np.arange(50)), 90, 60) for c in (crops, plain))
    assert np.array_equal(with_colours, without)
