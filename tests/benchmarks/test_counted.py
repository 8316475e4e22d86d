"""Steps have the launches and bytes of the committed table: more of them need a new table, and a reason."""

import json

import pytest
import torch

from fastmim.train.flops import CARDS

pytest.importorskip("triton")

import counted

RENEW = "python benchmarks/counted.py --renew"
KEPT = json.loads((counted.RESULTS / "counted.json").read_text())

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(KEPT["torch"].rpartition(".")[0]),
    reason=f"launches of torch {KEPT['torch']} are counted",
)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Turn off the fills of fresh memory that other tests need."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("step", counted.STEPS, ids=str)
def test_a_step_is_as_the_table_has_it(step):
    (kept,) = (kept for kept in KEPT["steps"] if kept.items() >= vars(step).items())
    found = step.count(CARDS[KEPT["card"]])
    before = {tuple(row[name] for name in ("stage", "direction", "kind", "kernel")): row for row in kept["rows"]}
    after = {(row.stage, row.direction, row.kind, row.kernel): row for row in found.rows}
    changed = [
        f"{' / '.join(key)}: {_described(before.get(key))} -> {_described(vars(after[key]) if key in after else None)}"
        for key in dict.fromkeys((*before, *after))
        if _described(before.get(key)) != _described(vars(after[key]) if key in after else None)
    ]
    output = "\n".join([f"{step} has changed; `{RENEW}` writes the table anew", *changed])
    assert found.launches == kept["launches"], output
    assert found.bytes == pytest.approx(kept["bytes"], rel=1e-3), output
    assert found.flops == pytest.approx(kept["flops"], rel=1e-3), output


def _described(row):
    return "none" if row is None else f"{row['launches']} launches, {(row['read'] + row['written']) / 1e6:.1f} MB"


def test_the_page_is_that_of_the_table():
    assert (counted.RESULTS / "counted.md").read_text() == counted.markdown(KEPT)


def test_what_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "counted.json"
    counted.main(["--model", "tiny", "--batch", "4", "--mask-ratio", "0.75", "--card", "a100", "--json", str(path)])
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert set(written) == {"launches", "bytes", "flops", "milliseconds", "rows"}
    assert written["launches"] == sum(row["launches"] for row in written["rows"]) > 300
    assert written["bytes"] == sum(row["read"] + row["written"] for row in written["rows"])
    assert written["milliseconds"] == pytest.approx(sum(row["milliseconds"] for row in written["rows"]))
    assert "A100" in printed and f"| all | {written['launches']} |" in printed


@pytest.mark.parametrize("peer", counted.PEERS)
def test_flops_of_vit_large_are_those_of_the_formula(peer):
    """Compare with 123 GFLOP an image; attention's backward pass repeats a product or more."""
    (kept,) = (k for k in KEPT["steps"] if k["model"] == "large" and k["peer"] == peer)
    assert kept["flops"] / kept["batch"] == pytest.approx(123e9, rel=0.03)
