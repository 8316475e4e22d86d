"""Files that are carried to a machine with a GPU are listed with their sizes and their commit."""

import sys

import pytest

from gpu import carried
from harness import commit


@pytest.fixture
def run(tmp_path, monkeypatch):
    folder = tmp_path / "build" / "flight"
    monkeypatch.setattr(carried, "ROOT", tmp_path)
    monkeypatch.setattr(carried, "WRITTEN", folder / "commit")
    folder.mkdir(parents=True)
    (folder / "triton.tar.gz").write_bytes(b"x" * (3 << 20))

    def run(*names, of="0123456789"):
        monkeypatch.setattr(carried, "commit", lambda: of)
        monkeypatch.setattr(sys, "argv", ["carried.py", *(str(tmp_path / name) for name in names)])
        return carried.main()

    run.folder = folder
    return run


def test_sizes_and_the_commit(run, tmp_path, capsys):
    (tmp_path / "_C.so").write_bytes(b"x" * (1 << 20))
    assert run("build/flight", "_C.so") == 0
    output = capsys.readouterr().out
    assert "3.0 MiB  build/flight\n" in output and "1.0 MiB  _C.so\n" in output and "4.0 MiB of at most 64" in output
    assert "benchmarks/flight.py first" in output and "benchmarks/flight.py second" in output
    assert (run.folder / "commit").read_text() == "0123456789\n" and "differ" not in output


def test_what_is_not_built_is_named(run, capsys):
    assert run("build/flight", "_C.so") == 1
    assert "not built: " in capsys.readouterr().out


def test_too_much_is_refused(run, tmp_path, capsys):
    (tmp_path / "_C.so").write_bytes(b"x" * (62 << 20))
    assert run("build/flight", "_C.so") == 1


def test_changes_are_named(run, capsys):
    assert run("build/flight", of="0123+changes") == 0
    assert "files differ from the commit" in capsys.readouterr().out


def test_the_commit_is_found_again_where_there_is_no_history(run, tmp_path):
    run("build/flight")
    assert commit.commit(tmp_path) == "0123456789"
