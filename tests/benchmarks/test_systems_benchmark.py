"""The rows of other systems in throughput.py: their plain forms are fastmim's algorithm, and FLOPs are counted."""

import dataclasses
import json

import pytest
import torch

import fastmim
import throughput
from pictures.photographs import Photographs, normalise
from rivals import agreement
from rivals.contestants import Contestant, Setting, batches
from rivals.footprint import step_flops
from rivals.sizes import Cell, train_flops
from rivals.systems import SYSTEMS

TINY = [name for name in SYSTEMS if name.endswith("_tiny")]
RUN = ["--batch-size", "1", "--steps", "1", "--device", "cpu", "--models"]


def setting_of(name):
    return Setting(name, 64 if SYSTEMS[name].multiple == 16 else 128, 2, "fp32", "cpu")


def contestants(name, cell, *others):
    setting = setting_of(name)
    template = setting.template()
    found = [Contestant(form, setting, template) for form in ("fastmim", *setting.system.peers, *others)]
    for contestant in found:
        contestant.enter(cell)
    sizes = setting.system.sizes(template)
    images = setting.system.inputs(Photographs(seed=1), 2, setting.image_size)
    return found, next(batches(images, 2, sizes, cell))


@pytest.mark.parametrize("name", TINY)
def test_contestants_compute_the_same_loss_and_gradients(name):
    """Compare in float64, on masks that predict some patches; those that decode all, with all predicted."""
    cell = SYSTEMS[name].cells[1]
    found, batch = contestants(name, cell)
    values = normalise(batch.images, torch.float64)
    batch = dataclasses.replace(batch, images=values, floats=values)
    expected = {}
    for contestant in reversed(found):
        every = contestant.decodes_all(cell)
        model = contestant.model.double()
        for form in ("plain-gather", "fastmim") if every else ():
            (other,) = (c for c in found if c.form == form)
            other.model.double()
            torch.testing.assert_close(
                contestant.loss(batch), other.loss(batch.predict_all()), rtol=1e-6, atol=0, msg=contestant.name
            )
        if not every:
            loss = contestant.loss(batch)
            loss.backward()
            grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
            assert all(grad is not None for grad in grads.values())
            expected = expected or {"loss": loss, **grads}
            torch.testing.assert_close({"loss": loss, **grads}, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_a_run_prints_tables_and_writes_rows(name, tmp_path, capsys):
    system, path = SYSTEMS[name], tmp_path / "rows.json"
    size = ["--image-size", str(setting_of(name).image_size)]
    assert throughput.main([*RUN, name, *size, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(system.cells) * (1 + len(system.peers))
    assert capsys.readouterr().out.count("×") == len(system.cells) * len(system.peers)
    for row in rows:
        assert row["model"] == name and row["flops_per_image"] > 0 and row["saved_bytes"] > 0
        partial = row["contestant"] in ("fastmim", "plain-gather")
        assert row["decodes_all"] == (row["decode_ratio"] < 1 and not partial)
    for first, second in zip(rows[:: 1 + len(system.peers)], rows[1 :: 1 + len(system.peers)]):
        assert (first["contestant"], second["contestant"]) == ("fastmim", "plain-gather")
        assert first["flops_per_image"] == second["flops_per_image"]
    # later, fastmim has made more steps
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


def test_counted_flops_are_those_of_the_formula(monkeypatch):
    """Count a masked autoencoder's, for which there is a formula."""
    cell = Cell(0.75, 0.25)
    found, batch = contestants("tiny", cell)
    peers = [contestant for contestant in found if contestant.form != "huggingface"]
    known = step_flops(peers, cell, batch)
    for contestant in peers:
        assert known[contestant.form] == train_flops(contestant.sizes, contestant.form, cell)
    sizes = dataclasses.replace(peers[0].sizes, draw=lambda *_: pytest.fail("counted from the batch"))
    monkeypatch.setattr(peers[0], "sizes", sizes)
    assert step_flops(peers, cell, batch) == known | {f"{form}+accelerated": n for form, n in known.items()}


@pytest.mark.parametrize("name", ["videomae_tiny", "dmae_tiny"])
def test_a_wrong_gradient_prints_no_speed_up(name, monkeypatch, capsys):
    right = fastmim.ops.decoder_tokens

    def wrong(visible, *args, **kwargs):
        return right(visible * 1.001 - visible.detach() * 0.001, *args, **kwargs)

    monkeypatch.setattr(fastmim.ops, "decoder_tokens", wrong)
    assert throughput.main([*RUN, name, "--image-size", "64"]) == 1
    out, err = capsys.readouterr()
    assert "×" not in out and "the gradient of fastmim" in err


def test_a_wrong_loss_of_a_peer_that_decodes_all_is_found(monkeypatch):
    cell = Cell(0.9, 0.5)
    found, batch = contestants("videomae_tiny", cell)
    agreement.check(found, setting_of("videomae_tiny"), cell, batch)
    with torch.no_grad():
        found[2].model.decoder.head.bias += 1e-2
    with pytest.raises(agreement.Disagreement, match="the loss of huggingface"):
        agreement.check(found, setting_of("videomae_tiny"), cell, batch)


def test_hugging_face_is_accelerated(capsys):
    cell = ["--mask-ratios", "0.75", "--decode-ratios", "1"]
    assert throughput.main([*RUN, "videomae_tiny", "--image-size", "64", *cell, "--accelerated"]) == 0
    assert "huggingface+accelerated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pixio_tiny", "--image-size", "96"], "--image-size: must be a multiple of pixio_tiny's 64, got 96"),
        (["pixio_tiny", "--mask-ratios", "0.99"], "pixio_tiny: mask_ratio 0.99 keeps none of the 16 cells"),
        (["videomae_tiny", "--decode-ratios", "0.9"], "videomae_tiny: decode_ratio must leave out at least one"),
        (["dmae_tiny", "--loader"], "--loader: must not be given with dmae_tiny"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        throughput.main(["--models", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
