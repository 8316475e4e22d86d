"""Videos as ClipLoader reads them: formats and sources, frames after a seek, and files that can't be served."""

import contextlib
import logging
import os

import av
import numpy as np
import pytest
import videos
from cases import TEST_ALL
from test_clips import load, names_of, starts_of, whole

from fastmim.data import clip_decoders
from fastmim.data.clip_files import open_videos
from fastmim.data.images import Unreadable


def opened(path):
    return clip_decoders.BACKENDS["pyav"].open(str(path))


def reason(path):
    """Return why a video, or some frame of it, can't be read."""
    with pytest.raises(Unreadable) as error, opened(path) as video:
        video.read(range(video.frames))
    return str(error.value)


# ---- frames ----------------------------------------------------------------------------------------------------------

X264 = {"options": {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0:log=-1"}}
REFRESH = {"options": {"x264-params": "intra-refresh=1:keyint=8:log=-1"}}
# a file, how it is written, and the number of its key frames
KINDS = {
    "closed.mp4": ({}, 2),
    "open.mp4": (X264, 3),
    "refreshed.mp4": (REFRESH, 3),
    "all_keys.mp4": ({"gop": 1}, 20),
    "plain.mp4": ({"b_frames": 0}, 2),
    "a.mkv": ({}, 2),
    # its times are those of decoding, not of showing
    "a.avi": ({}, 0),
    "mpeg4.avi": ({"codec": "mpeg4"}, 2),
    "a.ts": ({}, 2),
    "a.mpg": ({"codec": "mpeg2video"}, 2),
    "vp9.webm": ({"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}, 2),
    "hevc.mp4": ({"codec": "libx265", "options": {"x265-params": "log-level=none:pools=1"}}, 2),
    "jpegs.avi": ({"codec": "mjpeg", "pixels": "yuvj420p"}, 20),
    "ten_bits.mp4": ({"pixels": "yuv420p10le"}, 2),
    "variable.mp4": ({"times": [n * n + n % 3 for n in range(20)]}, 2),
}


# those left out by default resemble others
RARE = {"all_keys.mp4", "plain.mp4", "a.mkv", "jpegs.avi", "mpeg4.avi"}


def test_a_frame_after_a_seek_is_that_of_decoding_everything(tmp_path):
    for name in KINDS if TEST_ALL else KINDS.keys() - RARE:
        options, keys = KINDS[name]
        path = videos.write(tmp_path / name, 20, **options)
        with opened(path) as video:
            assert video.frames == 20 and len(video._index.keys) == keys, name
            plain = [frame for _, frame in video._decoded(frozenset())]
            expected = [clip_decoders._rgb(frame) for frame in plain]
            assert [videos.number_of(pixels) for pixels in expected] == list(range(20)), name
            for number in range(20) if TEST_ALL else range(0, 20, 3):
                assert np.array_equal(video.read([number])[0], expected[number]), (name, number)
            for numbers in ([3, 7, 11], [13, 14, 19, 19]):
                assert all(np.array_equal(a, expected[n]) for a, n in zip(video.read(numbers), numbers, strict=True))
        # another conversion to RGB
        assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(expected, videos.decoded(path))) < 3


@pytest.mark.parametrize("container", ["mp4", "h264"])
def test_files_without_a_table_of_their_frames(tmp_path, container):
    """A fragmented file, which states no number of frames, and a bare stream, which states no times."""
    options = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else {}
    path = videos.copied(videos.write(tmp_path / "a.mp4", 20), tmp_path / f"b.{container}", lambda n: True, options)
    with av.open(str(path)) as file:
        assert not file.streams.video[0].frames
    with opened(path) as video:
        assert [videos.number_of(frame) for frame in video.read(range(0, video.frames, 3))] == list(range(0, 20, 3))
    if container == "h264":
        assert not len(video._index.times)


def test_frames_are_turned_as_the_file_says(tmp_path):
    plain = videos.write(tmp_path / "plain.mp4", 2)
    for rotation in (90, 180, 270):
        turned = videos.write(tmp_path / f"{rotation}.mp4", 2, rotation=rotation)
        with opened(plain) as a, opened(turned) as b:
            assert np.array_equal(np.rot90(a.read([1])[0], rotation // 90), b.read([1])[0])


def test_a_video_of_one_frame(tmp_path):
    videos.write(tmp_path / "a.mp4", 1)
    (batch,) = load(tmp_path, 1)
    assert batch.images.shape == (1, 3, 4, 32, 32) and all((batch.images[:, :, :1] == batch.images).flatten())


def test_frames_before_the_first_key_frame_are_not_counted(tmp_path):
    path = videos.copied(videos.write(tmp_path / "a.mkv"), tmp_path / "b.mkv", lambda n: n > 3)
    with opened(path) as video:
        numbers = [videos.number_of(frame) for frame in video.read(range(video.frames))]
    assert numbers == list(range(12, 30))


# ---- files that can't be read ----------------------------------------------------------------------------------------


def test_truncated_files(tmp_path):
    for name in ("a.mp4", "a.mkv", "a.webm", "a.mpg", "front.mp4"):
        codec = {"a.webm": "libvpx-vp9", "a.mpg": "mpeg2video"}.get(name, "libx264")
        path = videos.write(tmp_path / name, codec=codec)
        if name == "front.mp4":
            path = videos.copied(path, tmp_path / "b.mp4", lambda n: True, {"movflags": "faststart"})
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        found = reason(path)
        # without the table at its end nothing is known
        assert "truncated" in found or "damaged" in found or name == "a.mp4", (name, found)


def test_damage_makes_the_clips_that_need_it_unreadable(tmp_path):
    path = videos.write(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        places = [packet.pos for packet in file.demux(video=0) if packet.is_keyframe]
    data[places[1] + 60 : places[1] + 120] = bytes(60)
    path.write_bytes(data)
    assert "Invalid data" in reason(path)
    with opened(path) as video:
        assert [videos.number_of(video.read([number])[0]) for number in (2, 5, 25)] == [2, 5, 25]


def test_files_that_are_no_videos(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"no video at all" * 100)
    # a playlist, which names an address on a network
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    for name in ("empty.mp4", "text.mp4", "list.mp4"):
        assert "Invalid data" in reason(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert reason(tmp_path / "sound.mp4") == "it has no video stream"


def test_damage_anywhere_raises_nothing_else(tmp_path):
    random, path = np.random.default_rng(0), tmp_path / "damaged"
    for name in ("a.mp4", "a.mkv", "a.ts"):
        data = np.frombuffer(videos.write(tmp_path / name, 12).read_bytes(), np.uint8)
        for count in (1, 3, 10, 30, 100):
            damaged = data.copy()
            damaged[random.integers(len(data), size=count)] = random.integers(256, size=count)
            path.write_bytes(damaged[: len(data) - count])
            with contextlib.suppress(Unreadable), opened(path) as video:
                video.read([video.frames - 1])
    data = (tmp_path / "a.mp4").read_bytes()
    path.write_bytes(data.replace(b"avc1", b"none"))
    assert reason(path) == "it is of a codec that is not known"


def test_a_video_without_key_frames(tmp_path):
    path = videos.copied(videos.write(tmp_path / "a.mp4"), tmp_path / "b.mp4", lambda n: 0 < n < 12)
    assert reason(path) == "it has no key frame"


def test_a_video_without_frames(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.add_stream("mpeg4", rate=25)
        container.start_encoding()
    assert reason(tmp_path / "a.mkv") == "EOFError: End of file"


def test_frames_of_several_sizes(tmp_path):
    path = tmp_path / "a.h264"
    parts = [videos.write(tmp_path / f"{n}.h264", 6, size=size) for n, size in enumerate([(64, 48), (96, 64)])]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert reason(path) == "frames of several sizes: 64x48, 96x64"


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable to root")
def test_a_file_without_permission(tmp_path):
    path = videos.write(tmp_path / "a.mp4", 2)
    path.chmod(0)
    assert "Permission" in reason(path)


def test_unreadable_videos_are_skipped_and_listed(tmp_path):
    for sample in range(12):
        videos.write(tmp_path / f"{sample:02}.mp4", 12, seed=sample)
    (tmp_path / "03.mp4").write_bytes(b"no video")
    loader = load(tmp_path)
    seen = [i for batch in loader for i in batch.ids.tolist()]
    assert sorted(seen) == [i for i in range(12) if i != 3]
    assert loader.skipped == {3: "InvalidDataError: Invalid data found when processing input"}
    assert '"03.mp4"' in (tmp_path / "quarantine.jsonl").read_text()
    with pytest.raises(RuntimeError, match=r"sample 3, 03\.mp4, can't be read: InvalidDataError"):
        list(load(tmp_path, on_error="raise"))
    # after it is repaired
    videos.write(tmp_path / "03.mp4", 12)
    assert {i for batch in loader for i in batch.ids.tolist()} == set(range(12)) and len(load(tmp_path).skipped) == 0


def test_a_pipe_and_a_missing_file(tmp_path):
    for sample in range(3):
        videos.write(tmp_path / f"{sample}.mp4", 12)
    source = open_videos(tmp_path)
    (tmp_path / "0.mp4").unlink()
    os.mkfifo(tmp_path / "0.mp4")
    (tmp_path / "1.mp4").unlink()
    with pytest.raises(Unreadable, match="no regular file"):
        source.path(0)
    with pytest.raises(Unreadable, match="FileNotFoundError"):
        source.path(1)


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_a_list_of_paths_and_labels(tmp_path):
    for sample in range(4):
        videos.write(tmp_path / "some videos" / f"{sample}.mp4", 12, seed=sample)
    listing = tmp_path / "train.csv"
    listing.write_text("".join(f"some videos/{n}.mp4 {7 - n}\n" for n in (2, 0, 3, 1)) + "\n")
    found = {i: label for b in load(listing, 2) for i, label in zip(b.ids.tolist(), b.labels.tolist())}
    assert found == {0: 7, 1: 6, 2: 5, 3: 4}
    listing.write_text("".join(f"{tmp_path}/some videos/{n}.mp4\n" for n in range(4)))
    assert load(listing, 2).source.labels is None
    paths = [tmp_path / "some videos" / f"{n}.mp4" for n in (1, 2)]
    assert load(paths, 1).source.names == ["1.mp4", "2.mp4"]


BAD_LISTS = [
    ("a.mp4 one", "list.txt, line 1 must be a path, a space and a label, a whole number; got 'a.mp4 one'"),
    ("a.mp4 1\na.mp4 2", "must hold a file once, got a.mp4 twice"),
    ("a.mp4 1\nb.mp4", "every line of .* must have a label, or none"),
    ("a.jpg 1", "a.jpg, which doesn't end in one of .mp4"),
    ("", "at least one file"),
]


def test_a_bad_list(tmp_path):
    for text, message in BAD_LISTS:
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "list.txt")


def test_a_bad_source(tmp_path, caplog):
    with pytest.raises(TypeError, match="source must be a path or a list of paths"):
        load(3)
    with pytest.raises(ValueError, match="source must be a folder, a list of files"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"holds no file that ends in one of \.mp4"):
        load(tmp_path)
    videos.write(tmp_path / "a.mp4", 2)
    (tmp_path / "notes.doc").write_text("")
    with caplog.at_level(logging.INFO):
        load(tmp_path, 1)
    assert "left out .doc: 1" in caplog.text


def test_names_and_frames_of_a_folder(tmp_path):
    for sample in range(3):
        videos.write(tmp_path / f"{sample}.mkv", 12, seed=sample)
    (batch,) = whole(tmp_path)
    assert batch.labels is None and all(starts_of(clip, 3) == 0 for clip in batch.images) and not names_of(tmp_path)
