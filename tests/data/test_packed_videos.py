"""Packed videos: the pixels of the files, tubes that are read alone, continuing, and unreadable videos."""

import numpy as np
import pytest
import test_clips
import torch
import videos
from test_clips import MASKS, load, names_of, patches_of

from fastmim import cli, masking
from fastmim.data import clip_decoders
from fastmim.data.clip_pack import pack_videos
from fastmim.data.patch_shards import PatchShards
from fastmim.data.patch_writer import PatchWriter

clips = test_clips.clips
PATCH = (2, 8, 8)


@pytest.fixture(scope="module")
def packed(clips, tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    pack_videos(clips, root, short_side=40, frame_stride=3, patch_size=PATCH, shard_size=4, num_threads=2)
    return root


def test_frames_are_those_of_the_files(clips, packed, tmp_path):
    loader = load(packed, seed=3)
    plain = load(clips, seed=3)
    assert loader.backend == "packed" and "packed" in repr(loader) and loader.classes == plain.classes
    assert loader.source.names == names_of(clips) and np.array_equal(loader.source.labels, plain.source.labels)
    # of 64x48, reduced to 53x40 and cut to whole patches
    assert loader.source.shape(0) == (3, 10, 40, 48)
    starts = set()
    for batch, other in zip(loader, plain, strict=True):
        assert torch.equal(batch.ids, other.ids) and torch.equal(batch.labels, other.labels)
        assert batch.images.is_contiguous(memory_format=torch.channels_last_3d)
        for clip, sample in zip(batch.images.numpy(), batch.ids.tolist()):
            whole = loader.source.array(sample)
            found = [
                (t, y, x)
                for t in range(0, 7, 2)
                for y in range(0, 9, 8)
                for x in range(0, 17, 8)
                if np.array_equal(whole[:, t : t + 4, y : y + 32, x : x + 32], clip)
            ]
            assert len(found) == 1
            starts |= set(found)
    assert len(starts) > 6
    # without reducing, and a few frames of the middle
    small = pack_videos(clips, tmp_path / "whole", frame_stride=3, clip_length=6, patch_size=PATCH)
    with clip_decoders.BACKENDS["pyav"].open(str(clips / names_of(clips)[5])) as video:
        expected = np.stack(video.read(range(6, 24, 3))).transpose(3, 0, 1, 2)
    assert np.array_equal(small.array(5), expected)


@pytest.mark.parametrize(("mask", "repeats"), [("tube", 1), ("few", 2)])
def test_patches_are_those_of_whole_clips(packed, mask, repeats):
    options = {"flip": True, "repeats": repeats}
    wholes, parts = load(packed, **options), load(packed, **options, patch_size=PATCH, masking=MASKS[mask])
    for _ in range(2):
        for a, b in zip(parts, wholes, strict=True):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
            for patches, ids in ((a.patches.visible, a.mask.ids_keep), (a.patches.predicted, a.mask.ids_predict)):
                assert torch.equal(patches, patches_of(b.images, ids))


def test_half_of_the_clips_are_mirrored(packed):
    turned = kept = 0
    for a, b in zip(load(packed, flip=True), load(packed)):
        for x, y in zip(a.images, b.images):
            kept, turned = kept + torch.equal(x, y), turned + torch.equal(x.flip(3), y)
    assert turned + kept == test_clips.SAMPLES and turned > 1 and kept > 1


def test_a_tube_mask_reads_a_tenth_of_the_bytes(packed, monkeypatch):
    """Bytes that are read with a tube mask of 0.9 and one predicted patch."""
    read, plain = [], PatchShards.read

    def counted(self, sample, ids=None):
        found = plain(self, sample, ids)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(PatchShards, "read", counted)
    whole = list(load(packed, image_size=40))
    bytes_whole, grid = sum(read), (2, 5, 5)
    assert bytes_whole == sum(batch.images.numel() for batch in whole)
    read.clear()

    def visible(seeds):
        removed = masking.tube(len(seeds), grid, 0.9, seeds=seeds).mask.bool()
        return masking.from_bool(removed, predict=removed & (removed.cumsum(1) == 1))

    seen = [len(b.patches.visible[0]) for b in load(packed, image_size=40, patch_size=PATCH, masking=visible)]
    # 22 of 25 cells are removed
    assert set(seen) == {2 * 3} and sum(read) / bytes_whole == (2 * 3 + 1) / 50


def test_short_and_small_videos(tmp_path):
    videos.write(tmp_path / "videos" / "a.mp4", 1)
    videos.write(tmp_path / "videos" / "b.mp4", 4)
    for n in range(12):
        videos.write(tmp_path / "videos" / f"c{n:02}.mp4", 12)
    videos.write(tmp_path / "videos" / "small.mp4", 12, size=(64, 24))
    pack_videos(tmp_path / "videos", tmp_path / "out", frame_stride=3, patch_size=PATCH)
    loader = load(tmp_path / "out")
    found = {i: image for batch in loader for i, image in zip(batch.ids.tolist(), batch.images)}
    assert loader.source.shape(0)[1] == loader.source.shape(1)[1] == 2
    assert all(torch.equal(found[i][:, :2], found[i][:, 2:]) for i in (0, 1)) and len(found) == 14
    assert loader.skipped == {14: "frames of 64x24, less than image_size (32, 32) by width and height"}


def test_packing_continues_and_lists_unreadable_videos(clips, tmp_path, monkeypatch):
    for sample in range(11):
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / f"{sample:02}.mp4").write_bytes((clips / names_of(clips)[sample]).read_bytes())
    (tmp_path / "videos" / "07.mp4").write_bytes(b"no video")
    options = {"frame_stride": 3, "patch_size": PATCH, "shard_size": 4}
    plain = PatchWriter.add

    def interrupted(self, array, label, name, **others):
        if name == "05.mp4":
            raise KeyboardInterrupt
        plain(self, array, label, name, **others)

    monkeypatch.setattr(PatchWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_videos(tmp_path / "videos", tmp_path / "out", **options)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is not finished: run the same `fastmim pack` again"):
        load(tmp_path / "out")
    done = []
    found = pack_videos(tmp_path / "videos", tmp_path / "out", **options, progress=done.append)
    assert done == [4] + 7 * [1] and found.reasons == {7: "InvalidDataError: Invalid data found when processing input"}
    assert '"07.mp4"' in (tmp_path / "out" / "quarantine.jsonl").read_text()
    whole = pack_videos(tmp_path / "videos", tmp_path / "whole", **options)
    assert all(np.array_equal(found.array(i), whole.array(i)) for i in range(11) if i != 7)
    # a file that was repaired since
    (tmp_path / "videos" / "07.mp4").write_bytes((clips / names_of(clips)[7]).read_bytes())
    repaired = pack_videos(tmp_path / "videos", tmp_path / "out", **options)
    assert not repaired.reasons and np.array_equal(repaired.array(5), whole.array(5))
    with pytest.raises(ValueError, match="holds another packed dataset: settings was"):
        pack_videos(tmp_path / "videos", tmp_path / "out", **{**options, "frame_stride": 2})
    with pytest.raises(ValueError, match="is a packed dataset already"):
        pack_videos(tmp_path / "out", tmp_path / "again")
    seen = [i for batch in load(tmp_path / "whole") for i in batch.ids.tolist()]
    assert sorted(seen) == [i for i in range(11) if i != 7]


def test_a_damaged_patch_is_skipped(clips, tmp_path):
    pack_videos(clips, tmp_path, frame_stride=3, patch_size=PATCH, short_side=32, clip_length=4)
    path = tmp_path / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    loader = load(tmp_path)
    assert {i for batch in loader for i in batch.ids.tolist()} == set(range(1, 11)) and list(loader.skipped) == [0]
    assert f"{path} is damaged: the checksum of patch 0" in loader.skipped[0]


BAD = [
    ({"sampling_rate": 4}, "sampling_rate must be 3, the step of the frames packed in .*; got 4"),
    ({"image_size": 36}, r"clips of \(4, 36, 36\) must be whole patches of \(2, 8, 8\)"),
    ({"patch_size": (2, 4, 4), "masking": len}, r"patch_size must be \(2, 8, 8\), the size packed .*; got \(2, 4, 4\)"),
    ({"scale": (0.5, 1)}, r"scale must be None with packed videos"),
]


def test_a_bad_argument_is_named(clips, packed, tmp_path):
    for options, message in BAD:
        with pytest.raises(ValueError, match=message):
            load(packed, **options)
    for name, value in (("short_side", 0), ("frame_stride", 0), ("clip_length", 1), ("patch_size", (1, 8))):
        with pytest.raises(ValueError, match=name):
            pack_videos(clips, tmp_path / "out", **{name: value})
    with PatchWriter(tmp_path / "arrays", (4,), samples=1, channels=2, dtype="float32") as writer:
        writer.add(np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match="source must be packed videos, got packed arrays of 1 axes"):
        load(tmp_path / "arrays")


def test_the_commands(clips, tmp_path, capsys):
    for sample in range(11):
        (tmp_path / f"{sample:02}.mp4").write_bytes((clips / names_of(clips)[sample]).read_bytes())
    (tmp_path / "07.mp4").write_bytes(b"no video")
    given, out = str(tmp_path), str(tmp_path / "out")
    options = ["--clip-length", "4", "--patch-size", "2,8,8"]
    assert cli.main(["pack", given, out, *options]) == 1
    assert "--clip-length needs --frame-stride" in capsys.readouterr().err
    assert cli.main(["pack", given, out, *options, "--frame-stride", "3", "--short-side", "32"]) == 0
    assert f"{out}: 10 videos; 1 can't be read" in capsys.readouterr().out
    assert len(next(iter(load(out, 10))).ids) == 10
    assert cli.main(["check-data", given, "--videos"]) == 1
    assert "11 videos, 1 can't be read, listed in" in capsys.readouterr().out
    (tmp_path / "07.mp4").unlink()
    assert cli.main(["check-data", given, "--videos", "--threads", "1"]) == 0
    assert cli.main(["check-data", out, "--videos"]) == 1
    assert "11 videos, 1 can't be read" in capsys.readouterr().out
