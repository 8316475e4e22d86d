"""ClipLoader: frames, crops, patches, decoders and arguments; test_videos.py has the files."""

import sys
import types

import numpy as np
import pytest
import torch
import videos

import fastmim
from fastmim import masking
from fastmim.data import Batch, ClipLoader, PatchBatch, clip_decoders
from fastmim.data.clip_crops import Clips, MultiScaleCrops
from fastmim.data.crops import Crops
from fastmim.data.resample import Cut
from fastmim.data.seeds import mask_seeds

SAMPLES, FRAMES = 11, 30


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Folder of videos that no test may change."""
    root = tmp_path_factory.mktemp("videos")
    for sample in range(SAMPLES):
        videos.write(root / f"class{sample % 3}" / f"{sample:02}.mp4", FRAMES, seed=sample)
    return root


def load(source, batch_size=3, **options):
    settings = {"num_frames": 4, "sampling_rate": 3, "image_size": 32, "num_threads": 2, "drop_last": False}
    return ClipLoader(source, batch_size, **{**settings, **options})


def names_of(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.mp4"))


def starts_of(clip, rate):
    """Return the number of the first frame of a clip (3, T, 48, 64), whose frames must be `rate` apart."""
    numbers = [videos.number_of(frame) for frame in clip.permute(1, 2, 3, 0).numpy()]
    assert numbers == list(range(numbers[0], numbers[0] + rate * len(numbers), rate))
    return numbers[0]


# ---- frames ----------------------------------------------------------------------------------------------------------


def whole(source, batch_size=3, **options):
    """Return a loader of whole frames as they are."""
    return load(source, batch_size, **{"image_size": (48, 64), "scale": (1, 1), "ratio": (4 / 3, 4 / 3), **options})


def test_frames_are_those_of_decoding_everything(clips):
    names, starts = names_of(clips), set()
    loader = whole(clips)
    for _ in range(3):
        for batch in loader:
            assert isinstance(batch, Batch) and batch.images.shape[1:] == (3, 4, 48, 64)
            assert batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last_3d)
            for clip, sample, label in zip(batch.images, batch.ids.tolist(), batch.labels):
                assert loader.classes[label] == names[sample].partition("/")[0]
                starts.add(starts_of(clip, 3))
                with clip_decoders.BACKENDS["pyav"].open(str(clips / names[sample])) as video:
                    assert video.frames == FRAMES
                    expected = np.stack(video.read(range(starts_of(clip, 3), starts_of(clip, 3) + 12, 3)))
                assert np.array_equal(clip.permute(1, 2, 3, 0).numpy(), expected)
                # against another conversion to RGB
                off = np.abs(expected.astype(int) - np.stack(videos.decoded(clips / names[sample]))[starts_of(clip, 3)])
                assert off[0].mean() < 4
    # 30 - 4 * 3 + 1 of them are possible
    assert len(starts) > 8 and max(starts) <= 18


def test_the_last_frame_of_a_short_video_repeats(tmp_path):
    for frames, expected in ((1, [0, 0, 0, 0]), (7, [0, 3, 6, 6]), (8, [0, 3, 6, 6]), (12, [0, 3, 6, 9])):
        videos.write(tmp_path / "a.mp4", frames)
        (batch,) = whole(tmp_path, 1)
        assert [videos.number_of(frame) for frame in batch.images[0].permute(1, 2, 3, 0).numpy()] == expected


def test_starts_are_uniform():
    plain = Clips(4, 3, Crops((32, 32), (0.5, 1), (1, 1), False, 1))
    draws = plain.draws(5, 0, np.arange(4000))
    starts = np.array([plain.frames(of_sample, 16)[0] for of_sample in draws])
    assert np.abs(np.bincount(starts, minlength=5) / 4000 - 0.2).max() < 0.03
    # independent of the crop
    assert abs(np.corrcoef(draws[:, 0, -1], draws[:, 0, 0])[0, 1]) < 0.05


def test_few_frames_are_decoded(clips, monkeypatch):
    """Frames from the key frame before a clip to its last frame, less some to which no other refers."""
    import av

    decoded, plain = [], clip_decoders._Opened._decoded
    monkeypatch.setattr(
        clip_decoders._Opened,
        "_decoded",
        lambda self, *args: (decoded.append(number) or (number, frame) for number, frame in plain(self, *args)),
    )
    with clip_decoders.BACKENDS["pyav"].open(str(clips / names_of(clips)[0])) as video:
        assert video._index.keys.tolist() == [0, 12, 24]
        video.read([14, 17])
    assert min(decoded) >= 12 and max(decoded) <= 17 + 2 and {14, 17} <= set(decoded) and len(decoded) < 8
    assert av.codec.Codec("h264", "r").name in clip_decoders.SKIPPING


# ---- crops -----------------------------------------------------------------------------------------------------------


def test_multi_scale_crops(clips):
    """Sizes and positions as VideoMAE's, all equally likely; the same for all frames of a clip."""
    crops = MultiScaleCrops((32, 32), (1, 1), (1, 1), False, 1)
    boxes = crops.boxes(crops.draws(0, 0, np.arange(6000)), 64, 48).reshape(-1, 5)
    # 0.66 of 48 is 31, which is near 32 and becomes it
    sides = [48, 42, 36, 32]
    pairs, count = np.unique(boxes[:, 2:4], axis=0, return_counts=True)
    assert {tuple(pair) for pair in pairs.tolist()} == {
        (sides[i], sides[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1
    }
    assert count.min() > 480 and count.max() < 720
    small = boxes[(boxes[:, 2] == 32) & (boxes[:, 3] == 32)]
    places, count = np.unique(small[:, :2], axis=0, return_counts=True)
    allowed = {(8 * x, 4 * y) for x in range(5) for y in range(5) if x % 2 == y % 2}
    assert {tuple(place) for place in places.tolist()} == allowed and len(allowed) == 13
    assert np.all(boxes[:, :2] >= 0) and np.all(boxes[:, 0] + boxes[:, 2] <= 64) and not boxes[:, 4].any()


def test_multi_scale_crops_of_small_frames():
    crops = MultiScaleCrops((32, 32), (1, 1), (1, 1), True, 1)
    for size in ((1, 1), (2, 5), (31, 33)):
        boxes = crops.boxes(crops.draws(0, 0, np.arange(300)), *size).reshape(-1, 5)
        assert np.all(boxes[:, 2:4] >= 1) and np.all(boxes[:, :2] >= 0)
        assert np.all(boxes[:, :2] + boxes[:, 2:4] <= size)


@pytest.mark.parametrize("scale", [None, (0.3, 1)])
def test_all_frames_have_the_same_crop(clips, scale):
    loader = load(clips, scale=scale, flip=True, repeats=2)
    batch = next(iter(loader))
    assert batch.images.shape == (6, 3, 4, 32, 32) and torch.equal(batch.ids[0::2], batch.ids[1::2])
    draws = loader.clips.draws(0, 0, batch.ids[::2].numpy())
    for row, image in enumerate(batch.images):
        with clip_decoders.BACKENDS["pyav"].open(str(clips / names_of(clips)[batch.ids[row]])) as video:
            frames = video.read(loader.clips.frames(draws[row // 2], FRAMES).tolist())
        left, top, width, height, flip = loader.clips.boxes(draws[row // 2], 64, 48)[row % 2].tolist()
        for frame, ours in zip(frames, image.permute(1, 2, 3, 0).numpy()):
            part = np.ascontiguousarray(frame[top : top + height, left : left + width])
            place = np.array([[0, 0, 3 * width, height, width, flip]])
            assert np.array_equal(Cut([part], place, (32, 32)).made()[0], ours)


# ---- patches ---------------------------------------------------------------------------------------------------------

GRID = (2, 4, 4)
MASKS = {
    "tube": lambda seeds: masking.tube(len(seeds), GRID, 0.75, seeds=seeds),
    "few": lambda seeds: masking.random(len(seeds), 32, 0.9, decode_ratio=0.1, seeds=seeds),
}


def patches_of(images, ids):
    return fastmim.ops.gather_patches(images, ids, (2, 8, 8)).mul(255).round().to(torch.uint8)


@pytest.mark.parametrize(("mask", "repeats"), [("tube", 2), ("few", 1)])
def test_patches_are_those_of_whole_clips(clips, mask, repeats):
    options = {"flip": True, "repeats": repeats, "seed": 2**63 + 5}
    wholes, parts = load(clips, **options), load(clips, **options, patch_size=(2, 8, 8), masking=MASKS[mask])
    for epoch in range(2):
        for a, b in zip(parts, wholes, strict=True):
            assert isinstance(a, PatchBatch) and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
            drawn = MASKS[mask](mask_seeds(2**63 + 5, epoch, b.ids))
            assert torch.equal(a.mask.ids_keep, drawn.ids_keep) and torch.equal(a.mask.ids_predict, drawn.ids_predict)
            for patches, ids in ((a.patches.visible, drawn.ids_keep), (a.patches.predicted, drawn.ids_predict)):
                assert torch.equal(patches, patches_of(b.images, ids))


def test_a_model_takes_clips_and_patches_of_them(clips):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_embed_dim": 24, "decoder_depth": 1}
    model = fastmim.MaskedAutoencoder((4, 32, 32), (2, 8, 8), **sizes, decoder_num_heads=2)
    parts = load(clips, patch_size=(2, 8, 8), masking=MASKS["tube"])
    for a, b in zip(load(clips), parts, strict=True):
        whole, part = (model(images, mask=b.mask).loss for images in (a.images, b.patches))
        assert torch.equal(whole, part)
    part.backward()


# ---- decoders --------------------------------------------------------------------------------------------------------


def test_a_decoder_that_is_not_installed(clips, monkeypatch):
    monkeypatch.setattr(clip_decoders, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend 'auto' needs av: pip install 'fastmim\[video\]'"):
        load(clips)
    with pytest.raises(ValueError, match=r"'torchcodec' needs torchcodec: pip install 'fastmim\[torchcodec\]'"):
        load(clips, backend="torchcodec")


def test_torchcodec_is_asked_for_the_same_frames(clips, monkeypatch):
    class VideoDecoder:
        def __init__(self, path, *, dimension_order, num_ffmpeg_threads, seek_mode):
            assert (dimension_order, num_ffmpeg_threads, seek_mode) == ("NHWC", 1, "exact")
            if path.endswith("04.mp4"):
                raise RuntimeError("no stream\nfound")
            with clip_decoders.BACKENDS["pyav"].open(path) as video:
                self.frames = video.read(range(video.frames))

        def __len__(self):
            return len(self.frames)

        def get_frames_at(self, indices):
            return types.SimpleNamespace(data=torch.from_numpy(np.stack([self.frames[i] for i in indices])))

    expected = list(load(clips))
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=VideoDecoder))
    monkeypatch.setattr(clip_decoders, "find_spec", lambda name: name == "torchcodec" or None)
    loader = load(clips)
    assert loader.backend == "torchcodec"
    by_id = {i: image for batch in loader for i, image in zip(batch.ids.tolist(), batch.images)}
    assert list(loader.skipped.values()) == ["RuntimeError: no stream"] and len(by_id) == SAMPLES - 1
    assert all(torch.equal(by_id.get(i, x), x) for b in expected for i, x in zip(b.ids.tolist(), b.images))


# ---- arguments -------------------------------------------------------------------------------------------------------


BAD = [
    ({"num_frames": 0}, ValueError, "num_frames must be at least 1"),
    ({"sampling_rate": 1.5}, TypeError, "sampling_rate must be an int"),
    ({"image_size": 0}, ValueError, "image_size must be at least 1"),
    ({"ratio": (1, 2)}, ValueError, r"ratio must be None without scale.*got \(1, 2\)"),
    ({"scale": (0.5, 2)}, ValueError, "scale must be .*0 < low <= high <= 1"),
    ({"scale": (0.5, 1), "ratio": 1}, TypeError, "ratio must be a pair"),
    ({"flip": 1}, TypeError, "flip must be a bool"),
    ({"backend": "decord"}, ValueError, "backend must be one of auto, pyav, torchcodec; got 'decord'"),
    ({"patch_size": (2, 8, 8)}, ValueError, "got patch_size without masking"),
    ({"patch_size": (3, 8, 8), "masking": len}, ValueError, r"patch_size must divide clips \(4, 32, 32\)"),
    ({"patch_size": (2, 8), "masking": len}, ValueError, "patch_size must be an int or one int per axis"),
    ({"batch_size": 12, "drop_last": True}, ValueError, "must be at most the 11 videos"),
]


def test_a_bad_argument_is_named(clips):
    for options, error, message in BAD:
        with pytest.raises(error, match=message):
            load(clips, **options)


def test_repr(clips):
    assert "11 videos, 4 batches of 3, 4 frames each, backend pyav, shard 0 of 1" in repr(load(clips))


OTHERS = [
    ({"num_frames": 5}, "num_frames was 4, is 5"),
    ({"sampling_rate": 1}, "sampling_rate was 3, is 1"),
    ({"scale": (0.5, 1)}, r"scale was None, is \[0.5, 1.0\]"),
]


def test_a_state_of_other_settings_is_refused(clips):
    state = load(clips).state_dict()
    for options, message in OTHERS:
        with pytest.raises(ValueError, match=message):
            load(clips, **options).load_state_dict(state)
