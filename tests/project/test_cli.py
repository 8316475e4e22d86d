"""The fastmim command, run as a user does."""

import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastmim import cli
from fastmim.data import ImageLoader


@pytest.fixture
def folder(tmp_path):
    """Write eleven pictures and a file that is none."""
    (tmp_path / "photos").mkdir()
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index:02}.jpg")
    (tmp_path / "photos" / "05.jpg").write_bytes(b"no picture")
    return tmp_path / "photos"


def test_help_describes_the_commands(capsys):
    for arguments in (["--help"], ["pack", "--help"], ["check-data", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in (
        "pack",
        "check-data",
        "Decode all images once",
        "that can't be read",
        "--short-side",
        "default: all CPUs",
    ):
        assert words.lower() in output.lower(), words


@pytest.mark.parametrize("module", ["fastmim", "fastmim.cli"])
def test_the_command_runs_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "usage: fastmim" in done.stderr and "COMMAND" in done.stderr


def test_pack_and_load(folder, tmp_path, capsys):
    assert cli.main(["pack", str(folder), str(tmp_path / "packed"), "--short-side", "32", "--threads", "1"]) == 0
    output = capsys.readouterr().out
    assert "11 images; 1 can't be read" in output and "quarantine.jsonl" in output
    assert sum(len(batch.ids) for batch in ImageLoader(tmp_path / "packed", 4, image_size=16, drop_last=False)) == 11


def test_check_data(folder, tmp_path, capsys):
    assert cli.main(["check-data", str(folder)]) == 1
    output = capsys.readouterr().out
    assert "12 images, 1 can't be read" in output and '"05.jpg"' in (folder / "quarantine.jsonl").read_text()
    (folder / "05.jpg").unlink()
    assert cli.main(["check-data", str(folder), "--quarantine", str(tmp_path / "q")]) == 0
    assert not (tmp_path / "q").exists()


@pytest.mark.fault
def test_check_data_counts_files_that_are_left_out(folder, capsys):
    (folder / "05.jpg").unlink()
    cli.main(["check-data", str(folder)])
    assert "left out" not in capsys.readouterr().out
    for name in ("a.psd", "b.psd", "c.txt", "d"):
        (folder / name).write_bytes(b"")
    assert cli.main(["check-data", str(folder)]) == 0
    assert "left out: .psd: 2, .txt: 1, no suffix: 1" in capsys.readouterr().out


@pytest.mark.fault
def test_a_damaged_tar_is_one_line_and_an_exit_status(folder, tmp_path, capsys):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "00.jpg", "0.jpg")
        end = tar.offset
        tar.add(folder / "01.jpg", "1.jpg")
    path.write_bytes(path.read_bytes()[:end])
    assert cli.main(["check-data", str(path)]) == 1
    output = capsys.readouterr().err
    assert f"source {path} can't be read as an uncompressed tar file: at byte {end}, after '0.jpg': " in output


@pytest.mark.fault
def test_check_data_names_damaged_images_that_are_served(folder, tmp_path, capsys, monkeypatch):
    """Check that damaged images that training uses are not listed, and alone don't fail the command."""
    (folder / "05.jpg").unlink()
    data = (folder / "03.jpg").read_bytes()
    (folder / "03.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80)).save(folder / "dark.png")
    Image.new("RGB", (9, 9)).save(folder / "end.png")
    (folder / "end.png").write_bytes((folder / "end.png").read_bytes()[:-13])
    assert cli.main(["check-data", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "13 images, 0 can't be read" in output and not (folder / "quarantine.jsonl").exists()
    assert (
        "damaged: '03.jpg': Corrupt JPEG data: premature end" in output and "dim: 'dark.png': 16-bit values" in output
    )
    assert "damaged: 'end.png': " in output and "served: 2 damaged but decodable, 1 of 16 bits" in output
    (folder / "05.jpg").write_bytes(b"no picture")
    assert cli.main(["check-data", str(folder)]) == 1
    assert "1 can't be read" in capsys.readouterr().out
    assert len((folder / "quarantine.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr("fastmim.data.check_data.installed", lambda name: False)
    monkeypatch.setattr("fastmim.data.decoders.installed", lambda name: False)
    cli.main(["check-data", str(folder)])
    output = capsys.readouterr().out
    assert "damage in JPEGs wasn't looked for: pip install" in output and "03.jpg" not in output


@pytest.mark.fault
def test_pack_warns_once_of_nearly_black_pictures(tmp_path, caplog):
    (tmp_path / "photos").mkdir()
    for index in range(3):
        Image.fromarray(np.full((9, 9), index, np.uint16)).save(tmp_path / "photos" / f"{index}.png")
    assert cli.main(["pack", str(tmp_path / "photos"), str(tmp_path / "packed")]) == 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert "png' and perhaps others: 16-bit values that are all below 4096" in line


def test_check_data_of_a_damaged_packed_dataset(folder, tmp_path, capsys):
    (folder / "05.jpg").unlink()
    cli.main(["pack", str(folder), str(tmp_path / "packed")])
    data = bytearray((tmp_path / "packed" / "shard-00000.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "packed" / "shard-00000.bin").write_bytes(data)
    assert cli.main(["check-data", str(tmp_path / "packed")]) == 1
    assert "shard-00000.bin is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["pack", "nowhere", "out"], 1, "source must be a folder"),
        (["check-data", "nowhere"], 1, "source must be a folder"),
        (["pack", "nowhere"], 2, "required: OUT"),
        (["pack", "a", "b", "--short-side", "0"], 2, "must be a whole number from 1 up"),
        (["train"], 2, "invalid choice: 'train'"),
    ],
)
def test_a_bad_argument_is_one_line_and_an_exit_status(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    try:
        found = cli.main(arguments)
    except SystemExit as exit_:
        found = exit_.code
    err = capsys.readouterr().err
    assert found == status and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
