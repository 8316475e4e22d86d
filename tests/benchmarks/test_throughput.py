"""The throughput benchmark: its peers compute the published algorithms, and no wrong speed-up is printed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fastmim
import throughput
from harness.memory import SavedBytes
from pictures.photographs import Photographs, normalise
from rivals import attention_forms, vit_mae
from rivals.breakdown import Recorded, share_of_step
from rivals.contestants import PEERS, Contestant, Setting, batches
from rivals.sizes import Cell, Sizes, train_flops

TINY = ["--models", "tiny", "--image-size", "64", "--batch-size", "2", "--steps", "2", "--device", "cpu"]
KEYS = {
    *("contestant", "model", "mask_ratio", "decode_ratio", "dtype", "device", "images_per_second", "seconds_median"),
    *("seconds_all", "flops_per_image", "matmul_share", "peak_memory_bytes", "loss", "ratio", "saved_bytes"),
}
ENVIRONMENT = {"torch", "python", "fastmim", "device_name", "threads", "commit", "command", "matmul_flops_per_second"}
SETTING = Setting("tiny", 64, 2, "fp32", "cpu")
CELLS = [Cell(0.75, 1.0), Cell(0.75, 0.3)]
SIZES = Sizes.of(SETTING.template())


@pytest.fixture(scope="module")
def template():
    return SETTING.template()


def batch(count=2):
    return next(batches(Photographs(seed=1).crops(count, 64), count, SIZES, CELLS[0]))


def entered(form, template, cell, setting=SETTING):
    contestant = Contestant(form, setting, template)
    contestant.enter(cell)
    return contestant


def test_accelerated_peers_run_beside_themselves(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    status = throughput.main(
        [*TINY, "--mask-ratios", "0.75", "--peers", "huggingface", "--accelerated", "--json", str(rows)]
    )
    output = capsys.readouterr().out
    assert status == 0
    found = {row["contestant"]: row for row in json.loads(rows.read_text())["rows"]}
    assert set(found) >= {"fastmim", "plain-gather", "huggingface", "huggingface+accelerated"}
    for name, row in found.items():
        assert (row["speedup"] is not None) == name.endswith("+accelerated")
        assert row["ratio"] is None or row["ratio"] > 0
    assert output.count("as fast as without") == sum(name.endswith("+accelerated") for name in found)


def test_a_run_prints_a_table_and_writes_its_rows(tmp_path):
    command = [sys.executable, throughput.__file__, *TINY]
    command += ["--mask-ratios", "0.75", "--decode-ratios", "1", "0.25", "--json", "out.json"]
    # as make runs it
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("×") == 6 and run.stdout.count("decodes all") == 2
    assert "plain-gather" in run.stdout and "fastmim's step" in run.stdout

    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"].keys() >= ENVIRONMENT
    assert len(written["rows"]) == 8
    for row in written["rows"]:
        assert row.keys() >= KEYS
        assert len(row["seconds_all"]) == 2 and row["images_per_second"] > 0 and row["saved_bytes"] > 0
        assert row["decodes_all"] == (row["decode_ratio"] < 1 and row["contestant"] in ("plain", "huggingface"))
    gather, plain = (next(r for r in written["rows"][4:] if r["contestant"] == c) for c in ("plain-gather", "plain"))
    assert gather["flops_per_image"] < plain["flops_per_image"]


@pytest.mark.parametrize("cell", CELLS)
def test_the_products_alone_are_nearly_all_flops_of_a_step(template, cell):
    contestant = entered("fastmim", template, cell)
    with Recorded() as recorded:
        contestant.step(batch())
    flops = sum(2 * left[0].numel() * right[0][1] for left, right in recorded.operands)
    whole = 2 * train_flops(contestant.sizes, "fastmim", cell)
    # the rest is attention's, and the forward pass of the patch embedding
    assert 0.9 < flops / whole < 1
    assert share_of_step(contestant, [batch()]) > 0


@pytest.mark.parametrize("form", ["fastmim", "plain", "plain-gather"])
def test_peers_compute_what_hugging_face_computes(template, form):
    def loss_and_gradients(form):
        contestant = entered(form, template, Cell(0.75, 1.0))
        contestant.model.double()
        given = batch()
        exact = type(given)(normalise(given.images, torch.float64), normalise(given.images, torch.float64), given.noise)
        loss = contestant.loss(exact)
        loss.backward()
        return loss, {name: p.grad for name, p in contestant.model.named_parameters() if p.requires_grad}

    loss, gradients = loss_and_gradients(form)
    expected_loss, expected = loss_and_gradients("huggingface")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=0)
    for name, gradient in gradients.items():
        theirs = torch.cat([expected.pop(key) for key in vit_mae.names(name, expected)])
        torch.testing.assert_close(gradient, theirs, rtol=1e-7, atol=1e-9, msg=name)
    assert not expected


def test_a_decode_ratio_scores_the_next_ranks_of_the_noise_and_sees_no_others(template):
    cell = Cell(0.75, 0.3)
    contestant = entered("plain-gather", template, cell)
    given = batch()
    ranks = given.noise.argsort(1).argsort(1)
    loss = contestant.loss(given)

    def loss_without(chosen):
        pixels = chosen.view(2, 1, 4, 4).float().repeat_interleave(16, 2).repeat_interleave(16, 3)
        noise = torch.rand(given.floats.shape, generator=torch.Generator().manual_seed(0))
        return contestant.loss(type(given)(given.images, torch.where(pixels > 0, noise, given.floats), given.noise))

    # 4 of 16 patches are visible, round(0.3 * 12) = 4 predicted
    assert torch.equal(loss_without(ranks >= 8), loss)
    assert all(not torch.equal(loss_without(ranks == rank), loss) for rank in range(8))


@pytest.mark.parametrize("form", ["fastmim", *PEERS])
def test_the_residual_stream_is_fp32_under_autocast(template, form):
    setting = Setting("tiny", 64, 2, "bf16", "cpu")
    contestant = entered(form, template, Cell(0.75, 1.0), setting)
    streams, products = [], []

    def watch(module, _, out):
        if "Block" in type(module).__name__ or "Layer" in type(module).__name__:
            streams.append(out[0] if isinstance(out, tuple) else out)
        if isinstance(module, torch.nn.Linear):
            products.append(out)

    for module in contestant.model.modules():
        module.register_forward_hook(watch)
    with setting.autocast():
        loss = contestant.loss(batch())
    assert len(streams) >= 16 and {stream.dtype for stream in streams} == {torch.float32}
    assert {product.dtype for product in products} == {torch.bfloat16}
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form", ["plain", "plain-gather"])
def test_flops_are_those_that_pytorch_counts(template, form, cell):
    contestant = entered(form, template, cell)
    for block in [*contestant.model.blocks, *contestant.model.decoder_blocks]:
        block.attn.attend = attention_forms.matmuls
    with FlopCounterMode(display=False) as counter:
        contestant.loss(batch()).backward()
    assert counter.get_total_flops() == 2 * train_flops(contestant.sizes, form, cell)


@pytest.mark.fault
@pytest.mark.parametrize("cell", CELLS)
def test_pytorch_counts_the_flops_of_our_ops(template, cell):
    """Compare with the algorithm's FLOPs, scores that backward passes repeat, and unused queries of the last block."""
    contestant = entered("fastmim", template, cell)
    sizes = contestant.sizes
    with FlopCounterMode(display=False) as counter:
        contestant.loss(batch()).backward()
    visible, predicted = 1 + sizes.visible(cell), sizes.predicted(cell)
    tokens = visible + predicted
    again = 2 * sizes.depth * visible**2 * sizes.width
    again += 2 * ((sizes.decoder_depth - 1) * tokens + predicted) * tokens * sizes.decoder_width
    unused = 3 * 2 * visible * sizes.decoder_width**2
    assert counter.get_total_flops() == 2 * (train_flops(sizes, "fastmim", cell) + again + unused)


def test_saved_bytes_count_a_storage_once_and_no_parameters():
    linear = torch.nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8)
    with SavedBytes(linear, [x]) as saved:
        hidden = linear(x)
        _ = hidden.sin() + hidden.cos() + hidden[:2].exp().sum()
    # hidden, and the exponential that its own gradient needs
    assert saved.total == (4 * 8 + 2 * 8) * 4


def test_a_wrong_loss_prints_no_speed_up(monkeypatch, capsys):
    right = fastmim.ops.pixel_loss
    monkeypatch.setattr(fastmim.ops, "pixel_loss", lambda *args, **kwargs: right(*args, **kwargs) * (1 + 1e-4))
    assert throughput.main([*TINY, "--mask-ratios", "0.75"]) == 1
    out, err = capsys.readouterr()
    assert "×" not in out and "No speed-up is printed" in err and "the loss of fastmim" in err


def test_a_wrong_gradient_prints_no_speed_up(monkeypatch, capsys):
    right = fastmim.ops.decoder_tokens

    def wrong(visible, *args, **kwargs):
        return right(visible * 1.001 - visible.detach() * 0.001, *args, **kwargs)

    monkeypatch.setattr(fastmim.ops, "decoder_tokens", wrong)
    assert throughput.main([*TINY, "--mask-ratios", "0.75", "--decode-ratios", "0.25"]) == 1
    out, err = capsys.readouterr()
    assert "×" not in out and "No speed-up is printed" in err and "the gradient of fastmim" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "giant"], ["--models", "giant", "base"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bf16"]),
        (["--peers", "timm"], ["--peers", "timm", "plain-gather"]),
        (["--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["--mask-ratios", "1.5"], ["--mask-ratios", "1.5", "between 0 and 1"]),
        (["--mask-ratios", "0.999"], ["--mask-ratios", "0.999", "keeps none"]),
        (["--decode-ratios", "0"], ["--decode-ratios", "got 0", "at most 1"]),
        (["--batch-size", "0"], ["--batch-size", "'0'", "from 1 up"]),
        (["--image-size", "100"], ["--image-size", "100", "multiple", "16"]),
        (["--json", "no/such/folder/out.json"], ["--json", "no/such/folder", "exists"]),
        (["--data", "no/such/folder"], ["--data", "no/such/folder", "Pillow"]),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        throughput.main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert all(words in err for words in message), err


def test_photographs_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"--data .*which has none"):
        Photographs(str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"broken\.png"), pytest.raises(ValueError, match=r"--data .*which has none"):
        Photographs(str(tmp_path))
    (tmp_path / "below").mkdir()
    Image.new("RGBA", (40, 30), (10, 20, 30, 255)).save(tmp_path / "below" / "plain.PNG")
    with pytest.warns(UserWarning, match=r"broken\.png"):
        pictures = Photographs(str(tmp_path), seed=1)
        crops = pictures.crops(3, 32)
    assert crops.shape == (3, 3, 32, 32) and crops.is_contiguous(memory_format=torch.channels_last)
    assert crops[:, :, 5, 5].tolist() == [[10, 20, 30]] * 3


def test_shipped_photographs_are_the_same_for_the_same_seed():
    crops = Photographs(seed=3).crops(20, 32)
    assert torch.equal(crops, Photographs(seed=3).crops(20, 32))
    assert not torch.equal(crops, Photographs(seed=4).crops(20, 32))
    assert crops.dtype == torch.uint8 and crops.float().std() > 30
