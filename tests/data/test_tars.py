"""Tar files: refusal of damaged ones, and the right bytes and label for each image."""

import io
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from photos import picture
from PIL import Image

from fastmim.data.images import Unreadable, decode
from fastmim.data.sources import open_source


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def of(path, *names, **options):
    """Write a tar file of members whose content is the text after a colon in the name, or else the name."""
    pairs = [name.partition(":")[::2] for name in names]
    return write(path, [member(name, (label or name).encode()) for name, label in pairs], **options)


def content(source):
    labels = source.labels.tolist() if source.labels is not None else [None] * len(source.names)
    return [(name, source.read(i), label) for i, (name, label) in enumerate(zip(source.names, labels))]


@pytest.fixture
def small(tmp_path):
    """Tar file of three labelled images."""
    return of(tmp_path / "s.tar", *(each for i in range(3) for each in (f"{i}.jpg", f"{i}.cls:{i}")))


# ---- damaged files -----------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_tar_that_ends_anywhere_is_refused(small):
    whole, before = small.read_bytes(), content(open_source(small))
    end = 6 * 1024
    for size in (*range(0, end, 512), *range(7, end, 377), end, end + 100):
        small.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"s\.tar can't be read as an uncompressed tar file: "):
            open_source(small)
    for size in (end + 512, end + 700, end + 1024, len(whole)):  # with all or half of the end mark
        small.write_bytes(whole[:size])
        assert content(open_source(small)) == before


@pytest.mark.fault
def test_the_error_names_the_position(small):
    whole = small.read_bytes()
    for size, message in (
        (4096, r"at byte 4096, after '1\.cls': the file ends without an end mark"),
        (4200, r"at byte 4096, after '1\.cls': the file ends within a header, which has 104 of 512 bytes"),
        (4609, r"at byte 4096, after '1\.cls': the file ends within '2\.jpg': it has 4609 of 5120 bytes"),
        (0, "it is empty"),
    ):
        small.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=message):
            open_source(small)


@pytest.mark.fault
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_flipped_bit_of_a_header_loses_an_image(tmp_path, form):
    names = [f"{'folder/' * (14 * (i == 1))}{i}.{suffix}" for i in range(3) for suffix in ("jpg", "cls:7")]
    path = of(tmp_path / "s.tar", *names, format=form)
    before, whole = content(open_source(path)), path.read_bytes()
    with tarfile.open(path) as tar:
        data = {m.offset_data for m in tar}
        end = tar.offset
    draw = random.Random(form)
    with open(path, "r+b", buffering=0) as file:
        for at in range(end + 1024):
            if at // 512 * 512 in data:
                continue
            os.pwrite(file.fileno(), bytes([whole[at] ^ 1 << draw.randrange(8)]), at)
            try:
                after = open_source(path)
            except ValueError:
                continue
            finally:
                os.pwrite(file.fileno(), whole[at : at + 1], at)
            # extensions of headers have no checksum: a name may have changed
            assert len(after.names) + sum(after.left_out.values()) >= 3
            if form == tarfile.USTAR_FORMAT:
                assert content(after) == before


@pytest.mark.fault
@pytest.mark.parametrize(
    "records", [b"9 size=5\n", b"10 size=-5\n", b"11 size=5a\n", b"x", b"12 path=a.jpg", b"5 a\nb\n"]
)
def test_records_that_extend_a_header(tmp_path, records):
    info, data = member("pax", records, type=tarfile.XHDTYPE)
    path = write(tmp_path / "s.tar", [(info, data), member("a.jpg", b"a.jpg")], format=tarfile.USTAR_FORMAT)
    if records == b"9 size=5\n":
        assert content(open_source(path)) == [("s.tar/a.jpg", b"a.jpg", None)]
    else:
        with pytest.raises(ValueError, match="at byte 0, its first header: no valid header: it extends the next"):
            open_source(path)


@pytest.mark.fault
def test_data_after_the_end_mark(small, tmp_path):
    joined = tmp_path / "joined.tar"
    joined.write_bytes(small.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"at byte 10240, after '2\.cls': data follow the end mark: .* joined"):
        open_source(joined)
    # a header replaced by zeros
    hole = bytearray(small.read_bytes())
    hole[2048:2560] = bytes(512)
    joined.write_bytes(hole)
    with pytest.raises(ValueError, match=r"at byte 2560, after '0\.cls': data follow the end mark"):
        open_source(joined)
    joined.write_bytes(small.read_bytes() + bytes(3 << 20))
    assert len(open_source(joined).names) == 3


@pytest.mark.fault
def test_impossible_sizes(tmp_path):
    for size in (-512, -(2**40), 2**40, 2**62):
        path = of(tmp_path / "s.tar", "a.jpg", "b.jpg")
        block = bytearray(path.read_bytes()[:512])
        block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
        for kind in (b"0", b"x", b"L"):
            block[156:157] = kind
            block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
            path.write_bytes(bytes(block) + path.read_bytes()[512:])
            with pytest.raises(ValueError, match="at byte 0, its first header: "):
                open_source(path)


def test_long_names_and_global_headers(tmp_path):
    long = "folder/" * 60 + "ü.jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = of(tmp_path / "s.tar", long, f"{long[:-4]}.cls:5", "a.jpg", "a.cls:6", format=form)
        expected = [("s.tar/a.jpg", b"a.jpg", 6), (f"s.tar/{long}", long.encode(), 5)]
        assert content(open_source(path)) == expected
    path = of(tmp_path / "s.tar", "a.jpg", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all"})
    assert content(open_source(path)) == [("s.tar/a.jpg", b"a.jpg", None)]


@pytest.mark.fault
@pytest.mark.parametrize("size", [1, 9 << 30])
def test_a_size_that_needs_more_digits(tmp_path, size):
    info, _ = member("a.jpg")
    path = tmp_path / "s.tar"
    info.size = size
    block = info.tobuf(tarfile.GNU_FORMAT)
    with open(path, "wb") as file:
        file.write(block)
        file.truncate(512 + -(-size // 512) * 512 + 1024)
    source = open_source(path)
    if size == 1:
        assert source.read(0) == b"\0"
    else:
        with pytest.raises(Unreadable, match="it has 9663676416 bytes"):
            source.read(0)


def bytes_read():
    """Return the number of bytes that this process has read, as counted by the kernel."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_only_headers_and_labels_are_read(tmp_path):
    path = tmp_path / "s.tar"
    count, size = 20, 2 << 20
    with open(path, "wb") as file:
        for i in range(count):
            info, _ = member(f"{i}.jpg")
            info.size = size
            file.write(info.tobuf())
            file.seek(size, 1)
        file.write(bytes(1024))
    before = bytes_read()
    assert len(open_source(path).names) == count
    assert bytes_read() - before < count * 20_000


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        # images and labels of the same name are paired in order
        (["x.jpg", "x.cls:1", "x.jpg", "x.cls:2"], [1, 2]),
        # a key ends at the first dot, unless a label has dots in its key
        (["i 2.jpg", "i 2.cls:1", "i 2.1.jpg", "i 2.1.cls:2"], [2, 1]),
        (["a.seg.png", "a.jpg", "a.cls:3"], [3, 3]),
        (["1.5.jpg", "1.5.cls:4", "1.6.jpg", "1.6.cls:5"], [4, 5]),
        # other fields of WebDataset are not labels
        (["a.jpg", "a.cls:3", "a.fine.cls:many", "a.json"], [3]),
        (["a.jpg", "a.fine.cls:many"], None),
        (["x.jpg", "x.CLS:1", "y.JPG", "y.cls:2"], [1, 2]),
        (["./x.jpg", "x.cls:1", "y.jpg", "./y.cls:2", "z/./w.jpg", "z//w.cls:3"], [1, 2, 3]),
        (["a/x.jpg", "b/x.jpg", "a/x.cls:1", "b/x.cls:2"], [1, 2]),
        (["x.cls: -7\n", "x.jpg"], [-7]),
        ([f"x.cls:{2**63 - 1}", "x.jpg"], [2**63 - 1]),
        (["x.heic", "x.cls:cat", "y.jpg", "y.cls:1"], [1]),
    ],
)
def test_labels(tmp_path, names, labels):
    source = open_source(of(tmp_path / "s.tar", *names))
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert all(source.read(i).decode() == name[6:] for i, name in enumerate(source.names))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.jpg", "x.cls:1", "x.cls:2"], r"it holds 'x\.jpg' 1 times, but 2 labels for it: 'x\.cls', 'x\.cls'"),
        (["x.jpg", "x.cls:1", "x.CLS:2"], r"it holds 'x\.jpg' 1 times, but 2 labels for it: 'x\.cls', 'x\.CLS'"),
        (["x.jpg", "x.cls:1", "x.jpg"], r"it holds 'x\.jpg' 2 times, but 1 labels for it: 'x\.cls'"),
        (["x.jpg", "./x.jpg", "x.cls:1"], r"it holds 'x\.jpg' 2 times"),
        (["x.jpg", "x.cls:cat"], r"label 'x\.cls' must be an integer of 64 bits, got b'cat'"),
        (["x.jpg", "x.cls:" + "9" * 31], r"label 'x\.cls' must be an integer of 64 bits, got b'9999"),
        (["x.jpg", f"x.cls:{2**63}"], r"label 'x\.cls' must be an integer of 64 bits"),
        (["x.jpg", "x.cls:" + "9" * 5000], r"label 'x\.cls' must be an integer of 64 bits, got 5000 bytes"),
        (["x.jpg", "x.cls: "], r"label 'x\.cls' must be an integer of 64 bits, got b' '"),
        (["x.jpg", "x.cls:1_0"], r"label 'x\.cls' must be an integer of 64 bits, got b'1_0'"),
        (["x.jpg", "x.cls:1.0"], r"label 'x\.cls' must be an integer of 64 bits, got b'1.0'"),
        (["x.jpg", "x.cls:٣"], r"label 'x\.cls' must be an integer of 64 bits"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, names, message):
    with pytest.raises(ValueError, match=rf"source .*s\.tar: .*{message}"):
        open_source(of(tmp_path / "s.tar", *names))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.jpg", "x.cls:1", "y.jpg"], "1 of its 2 images have none: 's.tar/y.jpg'"),
        (["i 2.jpg", "i 2.cls:1", "i 2.1.jpg", "i 3.1.jpg", "i 3.1.cls:1"], "1 of its 3 images have none: 's.tar/i 2."),
        (["x.jpg", "a.jpg", "b.jpg", "c.jpg", "x.cls:1"], "3 of its 4 images have none: 's.tar/a.jpg', 's.tar/b.jpg'"),
    ],
)
def test_images_without_a_label_are_served_without_labels_and_named(tmp_path, caplog, names, message):
    assert open_source(of(tmp_path / "s.tar", *names)).labels is None
    assert f"no labels, since {message}" in caplog.text


@pytest.mark.fault
def test_labels_in_some_shards_only(tmp_path, caplog):
    of(tmp_path / "a.tar", "x.jpg", "x.cls:1")
    of(tmp_path / "b.tar", "y.jpg")
    of(tmp_path / "c.tar", "z.txt")
    assert open_source(tmp_path).labels is None
    assert "no labels, since 1 of its 2 images have none: 'b.tar/y.jpg'" in caplog.text
    assert open_source([tmp_path / "a.tar", tmp_path / "c.tar"]).labels.tolist() == [1]


# ---- links and sparse members ----------------------------------------------------------------------------------------


@pytest.mark.fault
def test_links(tmp_path):
    link = {"type": tarfile.LNKTYPE}, {"type": tarfile.SYMTYPE}
    path = write(
        tmp_path / "s.tar",
        [
            member("in/a.jpg", b"first"),
            member("in/b.jpg", linkname="in/a.jpg", **link[0]),
            member("c.jpg", linkname="in/b.jpg", **link[0]),
            member("in/d.jpg", linkname="a.jpg", **link[1]),
            member("e.jpg", linkname="in/../later/bytes", **link[1]),
            member("later/bytes", b"later"),
            member("f.jpg", linkname="e.jpg", **link[1]),
            member("g.jpg", linkname="f.jpg", **link[0]),
            member("h.jpg", linkname="nowhere.jpg", **link[0]),
            member("i.jpg", linkname="/etc/passwd", **link[1]),
            member("j.jpg", linkname="j.jpg", **link[1]),
            member("k.jpg", linkname="l.jpg", **link[1]),
            member("l.jpg", linkname="k.jpg", **link[1]),
            member("m.jpg", type=tarfile.FIFOTYPE),
            member("n.jpg", type=tarfile.CHRTYPE),
            member("o.jpg", type=tarfile.DIRTYPE),
            member("p.jpg", b"plain", type=tarfile.CONTTYPE),
        ],
    )
    source = open_source(path)
    found = {}
    for i, name in enumerate(source.names):
        try:
            found[name[6:]] = source.read(i).decode()
        except Unreadable as error:
            found[name[6:]] = str(error)
    assert {name: found.pop(name) for name in ("in/a.jpg", "in/b.jpg", "c.jpg", "in/d.jpg")} == dict.fromkeys(
        ("in/a.jpg", "in/b.jpg", "c.jpg", "in/d.jpg"), "first"
    )
    assert [found.pop(name) for name in ("e.jpg", "f.jpg", "g.jpg", "p.jpg")] == ["later"] * 3 + ["plain"]
    assert found.pop("h.jpg") == "s.tar: a link to 'nowhere.jpg', which the tar file doesn't hold"
    assert found.pop("i.jpg") == "s.tar: a link to '/etc/passwd', which the tar file doesn't hold"
    assert all("which the tar file doesn't hold" in found.pop(name) for name in ("j.jpg", "k.jpg", "l.jpg"))
    assert all("no regular file" in found.pop(name) for name in ("m.jpg", "n.jpg")) and not found


@pytest.mark.fault
def test_a_hard_link_leads_to_the_latest_member_before_it(tmp_path):
    members = [
        member("a.jpg", b"old"),
        member("b.jpg", linkname="a.jpg", type=tarfile.LNKTYPE),
        member("a.jpg", b"new"),
        member("c.jpg", linkname="./a.jpg", type=tarfile.LNKTYPE),
    ]
    assert [data for _, data, _ in content(open_source(write(tmp_path / "s.tar", members)))] == [
        b"old",
        b"new",
        b"old",
        b"new",
    ]


@pytest.mark.fault
def test_linked_labels(tmp_path):
    members = [
        member("a.jpg", b"a"),
        member("a.cls", b"7"),
        member("b.jpg", b"b"),
        member("b.cls", linkname="a.cls", type=tarfile.LNKTYPE),
    ]
    assert open_source(write(tmp_path / "s.tar", members)).labels.tolist() == [7, 7]
    members[-1] = member("b.cls", linkname="c.cls", type=tarfile.LNKTYPE)
    with pytest.raises(ValueError, match=r"label 'b\.cls' must be an integer of 64 bits, got a link to 'c\.cls'"):
        open_source(write(tmp_path / "s.tar", members))


GNU_TAR = shutil.which("tar") and b"GNU tar" in subprocess.run(["tar", "--version"], capture_output=True).stdout


@pytest.mark.fault
@pytest.mark.skipif(not GNU_TAR, reason="GNU tar writes them")
@pytest.mark.parametrize("options", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_sparse_members(tmp_path, options):
    for name, step in (("a.bmp", 37), ("b.bmp", 80)):
        pixels = np.zeros((3000, 400, 3), np.uint8)
        pixels[::step, 100:200] = 200
        Image.fromarray(pixels).save(tmp_path / "whole.bmp")
        whole = (tmp_path / "whole.bmp").read_bytes()
        with open(tmp_path / name, "wb") as file:
            for start in range(0, len(whole), 4096):
                block = whole[start : start + 4096]
                file.seek(start)
                file.write(block if block.strip(b"\0") else b"")
            file.truncate(len(whole))
    picture(1).save(tmp_path / "c.png")
    with open(tmp_path / "d.bmp", "wb") as file:
        file.truncate(100_000)
    command = ["tar", f"--format={options.split()[0]}", *options.split()[1:], "-S", "-cf", "s.tar"]
    subprocess.run([*command, "a.bmp", "b.bmp", "c.png", "d.bmp"], cwd=tmp_path, check=True)
    if os.path.getsize(tmp_path / "s.tar") > 3_000_000:
        pytest.skip("this file system has no holes")
    source = open_source(tmp_path / "s.tar")
    assert [name[6:] for name in source.names] == ["a.bmp", "b.bmp", "c.png", "d.bmp"]
    assert all(source.read(i) == (tmp_path / name[6:]).read_bytes() for i, name in enumerate(source.names))
    assert np.array_equal(np.asarray(decode(source.read(1))), pixels)
    assert source.read(0, 100) == source.read(0)[:100] and source.read(2, 9) == source.read(2)[:9]


@pytest.mark.fault
@pytest.mark.parametrize("found", ["0,512,2048,512", "0,4096", "512,512,0,512", "0,512,8000,512", "0,-512,600,512"])
def test_the_map_of_a_sparse_member(tmp_path, found):
    headers = {"GNU.sparse.name": "a.jpg", "GNU.sparse.size": "4096", "GNU.sparse.numblocks": "2"}
    members = [
        member("a.jpg", b"x" * 1024, pax_headers={**headers, "GNU.sparse.map": found}),
        member("b.jpg", b"y" * 5000),
    ]
    source = open_source(write(tmp_path / "s.tar", members, format=tarfile.PAX_FORMAT))
    if found == "0,512,2048,512":
        assert source.read(0) == b"x" * 512 + bytes(1536) + b"x" * 512 + bytes(1536)
    else:
        with pytest.raises(Unreadable, match="a sparse member whose map is damaged"):
            source.read(0)
    assert source.read(1) == b"y" * 5000
