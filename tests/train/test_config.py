"""Settings: the shipped configs are the published recipe, and wrong settings give an error of one line."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_run import ENVIRONMENT, SETTINGS, command

from fastmim import cli
from fastmim.train import Config, ConfigError, config, schedule
from fastmim.train.config import read
from fastmim.train.distributed import Processes, parallelize
from fastmim.train.objective import PixelObjective


def fault(*values):
    return pytest.param(*values, marks=pytest.mark.fault)


@pytest.mark.parametrize("name", config.shipped())
def test_shipped_configs_can_be_read(name):
    assert read(name, ["data=somewhere", "output_dir=out"]).data == "somewhere"


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_the_recipe(size):
    """Compare with table 8 of He et al., CVPR 2022, as facebookresearch/mae runs it."""
    recipe = read(f"mae_vit_{size}_imagenet")
    assert recipe.model == f"mae_vit_{size}_patch{14 if size == 'huge' else 16}"
    assert (recipe.image_size, recipe.mask_ratio, recipe.decode_ratio, recipe.norm_pix_loss) == (224, 0.75, 1.0, True)
    assert (recipe.batch_size, recipe.epochs, recipe.crop_scale, recipe.flip) == (4096, 800, (0.2, 1.0), True)
    assert (recipe.betas, recipe.weight_decay, recipe.clip_grad) == ((0.9, 0.95), 0.05, None)
    steps = 800 * 312
    rates = [schedule.learning_rate(recipe, step, steps) for step in (0, 20 * 312, 40 * 312, 420 * 312, steps)]
    assert rates == pytest.approx([0, 1.2e-3, 2.4e-3, 1.2e-3, 0])
    assert recipe.sharded == (size == "huge")


def test_learning_rates_that_drop():
    """Compare with SimMIM's: linear warm-up, and a tenth of the peak from epoch 700 of 800."""
    recipe = read("simmim_base")
    rates = [schedule.learning_rate(recipe, step, 8000) for step in (0, 50, 100, 6999, 7000, 7999)]
    assert rates == pytest.approx([0, 2e-4, 4e-4, 4e-4, 4e-5, 4e-5])
    twice = read("simmim_base", ["lr_drops=[0.5,0.75]", "min_lr=1e-5"])
    rates = [schedule.learning_rate(twice, step, 8000) for step in (3999, 4000, 6000)]
    assert rates == pytest.approx([4e-4, 4e-5, 1e-5])


def test_the_fast_variant_changes_the_objective():
    fast = read("mae_vit_base_imagenet_fast")
    assert (fast.mask_ratio, fast.decode_ratio) == (0.9, 0.25)
    assert "another objective" in (config.SHIPPED / "mae_vit_base_imagenet_fast.toml").read_text()


def test_groups_of_parameters():
    """Check that weights, class and mask token decay, biases and norms don't, and position tables aren't trained."""
    small = Config.of({"data": "x", "output_dir": "y", **SETTINGS})
    model = small.build()
    optimizer = schedule.adamw(model, small)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert {"norm.weight", "blocks.0.norm1.weight", "decoder_pred.bias"} <= plain
    assert not {"pos_embed", "decoder_pos_embed"} & (decayed | plain)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_values_on_the_command_line():
    small = read("quickstart_cpu", ["seed=3", "flip=true", "clip_grad=none", "data=a b", "model_options.depth=2"])
    assert (small.seed, small.flip, small.clip_grad, small.data) == (3, True, None, "a b")
    assert small.model_options["depth"] == 2 and small.model_options["patch_size"] == 8
    assert read("quickstart_cpu", ["crop_scale=[0.3, 1]", "base_lr=1"]).crop_scale == (0.3, 1.0)
    assert read("quickstart_cpu", ["output_dir=123"]).output_dir == "123"
    assert read("quickstart_cpu", ["dtype=bf16"]).dtype == "bfloat16"


@pytest.mark.fault
@pytest.mark.parametrize(
    "text",
    [
        "1e-4",
        "1.50",
        "true",
        "2024-01-01",
        "none",
        "0x10",
        "[1, 2]",
        "{a = 1}",
        "inf",
        "07:32:00",
        "runs/lr=1e-4",
        "a#b",
    ],
)
def test_the_value_of_a_key_of_text_is_that_text(text):
    for key in ("output_dir", "data"):
        assert getattr(read("quickstart_cpu", [f"{key}={text}"]), key) == text


@pytest.mark.fault
def test_quotes_are_those_of_toml():
    for text in ('"a b "', "'a b '", '"a\\u0020b "'):
        assert read("quickstart_cpu", [f"data={text}"]).data == "a b "
    for text in ('"a', 'a"', "it's", '"a" b'):
        assert read("quickstart_cpu", [f"data={text}"]).data == text
    assert read("quickstart_cpu", ["seed=1", "seed=2", "model=small", "model=base"]).seed == 2, "the last counts"


@pytest.mark.fault
@pytest.mark.parametrize("key", ["data", "output_dir"])
@pytest.mark.parametrize("value", ["1e-4", "5", "true", "2024-01-01", "1_000"])
def test_a_value_that_is_not_text_is_refused_rather_than_rewritten(tmp_path, key, value):
    (tmp_path / "run.toml").write_text("data = 'x'\noutput_dir = 'y'\n".replace(f"{key} = ", f"{key} = {value} #"))
    with pytest.raises(ConfigError, match=rf"^{key} must be text \(in TOML, in quotes\), got "):
        read(tmp_path / "run.toml")


@pytest.mark.fault
def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('data = "~/images"\noutput_dir = "~"')
    home = read("~/run.toml")
    assert (home.data, home.output_dir) == (f"{tmp_path}/images", str(tmp_path))
    assert read("~/run.toml", ["output_dir=~/a b"]).output_dir == f"{tmp_path}/a b"
    assert read("~/run.toml", ["output_dir=./~"]).output_dir == "./~"
    with pytest.raises(ConfigError, match=r"^output_dir ~nobody-here/x is in the home folder of no user"):
        read("~/run.toml", ["output_dir=~nobody-here/x"])


@pytest.mark.fault
def test_paths_of_python(tmp_path):
    small = Config(data=tmp_path, output_dir=tmp_path / "run")
    assert (small.data, small.output_dir) == (str(tmp_path), f"{tmp_path}/run")


@pytest.mark.fault
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_files_of_other_editors(tmp_path, encoding):
    text = 'data = "bäume"\r\noutput_dir = "y"\r\n'
    (tmp_path / "run.toml").write_bytes(text.encode(encoding))
    if encoding == "utf-8-sig":
        assert read(tmp_path / "run.toml").data == "bäume"
        return
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "run.toml")
    assert "is UTF-16" in str(caught.value) if encoding == "utf-16" else "can't be read as TOML" in str(caught.value)


def test_settings_survive_json():
    import json

    small = read("quickstart_cpu")
    assert Config.of(json.loads(json.dumps(small.to_dict()))) == small


BAD = [
    fault("clip_grad=null", "clip_grad must be float or none, got str 'null'"),
    fault("flip=True", "flip must be true or false, got str 'True'"),
    fault("image_size=33", "image_size (33, 33) must be a multiple of patch_size"),
    fault("output_dir=", "output_dir must be a path, got an empty one"),
    ("sed=1", "unknown key 'sed'"),
    ("seed=x", "seed must be int, got str 'x'"),
    ("seed=true", "seed must be int, got bool True"),
    ("seed=-1", "seed must be in 0.."),
    ("batch_size=0", "batch_size must be at least 1, got 0"),
    ("batch_size=2.5", "batch_size must be int"),
    ("mask_ratio=1.5", "mask_ratio must be"),
    ("mask_ratio=nan", "mask_ratio must be"),
    ("mask_ratio=0.999", "keeps none of the 36 patches"),
    ("decode_ratio=0", "decode_ratio must be"),
    ("image_size=30", "patch_size"),
    ("image_size=-32", "image_size must be at least 1"),
    ("model=giant", "model must be one of tiny, small, base, large, huge"),
    ("model_options.dept=1", "model_options: "),
    ("model_options.num_heads=3", "num_heads"),
    ("model_options.img_size=64", "image_size is a key of its own"),
    ("model_options.in_chans=1", "model_options must not hold in_chans"),
    ("model_options=3", "model_options must be a table"),
    ("dtype=int8", "dtype must be one of"),
    ("device=tpu", "device must be one of"),
    ("warmup=1", "warmup must be a share"),
    ("betas=[0.9]", "betas must be a list of 2 numbers"),
    ("betas=[0.9, 1.0]", "betas must be in [0, 1)"),
    ("crop_scale=[1.0, 0.2]", "crop_scale must be two ascending shares"),
    ("clip_grad=0", "clip_grad must be positive"),
    ("base_lr=inf", "base_lr must be finite"),
    ("max_steps=0", "max_steps must be at least 1"),
    ("keep_last=1", "keep_last must be at least 2"),
    ("nothing", "settings are given as key=value, got 'nothing'"),
    ("=1", "settings are given as key=value"),
    *([] if torch.cuda.is_available() else [("device=cuda", "device must be auto or cpu")]),
    *([] if torch.cuda.is_available() else [("cuda_graphs=true", "cuda_graphs needs device cuda")]),
    ("cuda_graphs=yes", "cuda_graphs must be \"auto\", true or false, got 'yes'"),
    ("cuda_graphs=1", 'cuda_graphs must be "auto", true or false, got 1'),
]


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            "micro_batch_size=2",
            "micro_batch_size must be none with compile and cuda_graphs, which take a batch whole; got 2",
        ),
        ("parallel=fsdp", "parallel must be auto or ddp with cuda_graphs, which know weights by address; got fsdp"),
    ],
)
def test_cuda_graphs_refuse_settings_that_move_memory(setting, message):
    with pytest.raises(ConfigError) as caught:
        read("quickstart_cpu", ["compile=true", "cuda_graphs=true", setting])
    assert str(caught.value) == message


def test_cuda_graphs_alone_take_a_batch_in_parts_but_no_shards():
    with pytest.raises(ConfigError, match="parallel must be auto or ddp with cuda_graphs"):
        read("quickstart_cpu", ["cuda_graphs=true", "micro_batch_size=2", "parallel=fsdp"])


def test_cuda_graphs_refuse_a_model_that_is_sharded_for_its_size(monkeypatch):
    huge = SimpleNamespace(cuda_graphs=True, compile=False, sharded=True, parallel="auto", model="mae_vit_huge_patch14")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(
        ConfigError, match=r"parallel must be ddp .*; auto shards mae_vit_huge_patch14 over 8 processes"
    ):
        parallelize(PixelObjective(torch.nn.Linear(1, 1)), huge, Processes(0, 8, torch.device("cuda", 0)))


def test_cuda_graphs_without_compile_refuse_several_processes():
    replicated = SimpleNamespace(cuda_graphs=True, compile=False, sharded=False)
    with pytest.raises(ConfigError, match="compile must be true with cuda_graphs over 8 processes, got false"):
        parallelize(PixelObjective(torch.nn.Linear(1, 1)), replicated, Processes(0, 8, torch.device("cuda", 0)))


@pytest.mark.parametrize("setting, message", BAD)
def test_bad_settings_are_one_clear_line(setting, message):
    with pytest.raises(ConfigError) as caught:
        read("quickstart_cpu", [setting])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="CONFIG must be a TOML file or one of croco_base, cropmae_small, "):
        read("quickstart_gpu")
    (tmp_path / "bad.toml").write_text("seed = ")
    with pytest.raises(ConfigError, match=r"bad\.toml can't be read as TOML"):
        read(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text("seed = 1")
    with pytest.raises(ConfigError, match="data is missing: add data=PATH"):
        read(tmp_path / "short.toml")


def test_an_error_of_the_command_is_one_line(tmp_path):
    """Check data that don't exist, and a file in the place of output_dir."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for settings in (
        [f"data={tmp_path / 'nowhere'}", f"output_dir={tmp_path / 'run'}"],
        [f"data={tmp_path / 'file'}", f"output_dir={tmp_path / 'file'}"],
    ):
        command = [sys.executable, "-m", "fastmim.cli", "pretrain", "quickstart_cpu", *settings]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert done.stderr.startswith("fastmim: ") and done.stderr.count("\n") == 1
        assert str(tmp_path) in done.stderr


@pytest.fixture
def places(photos, straight, tmp_path):
    """Return paths that are often given by mistake."""
    for name in ("empty", "text", "bad", "few"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "read.me").write_text("no picture")
    for number in range(8):
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"no picture")
    for path in sorted(photos.iterdir())[:2]:
        shutil.copy(path, tmp_path / "few")
    (tmp_path / "file").touch()
    return {"here": tmp_path, "photos": photos, "straight": straight}


MISTAKES = [
    ("data={here}/nowhere", "nowhere: must be a folder"),
    ("data={here}/empty", "holds no file that ends in"),
    ("data={here}/text", "holds no file that ends in"),
    ("data={here}/bad", "samples can't be read, and at most 10% may be"),
    ("data={here}/few", "must be at most the 2 images"),
    ("data={photos}/00.png", "00.png: must be a folder"),
    fault("batch_size=64", "batch_size must be at most the 18 images of data {photos}, got 64"),
    fault("output_dir={photos}", "output_dir must be another folder than data, got {photos} for both"),
    fault("output_dir={straight} flip=false", "holds another run: flip was True, is False;"),
    fault("output_dir={straight} crop_scale=[0.5,1]", "holds another run: crop_scale was [0.2, 1.0], is [0.5, 1.0];"),
    ("output_dir={here}/file", "can't be made"),
    ("output_dir={here}/file/run", "can't be made"),
    ("output_dir={straight} model=small", "holds another run: model was"),
    ("learning_rate=1", "unknown key 'learning_rate'"),
    ("lr_drops=[0.8,0.5]", "lr_drops must be ascending shares of the run from warmup, 0.05, to 1; got [0.8, 0.5]"),
    ("lr_drops=[0.01]", "lr_drops must be ascending shares of the run from warmup"),
    ("lr_drops=[1.0]", "lr_drops must be ascending shares of the run from warmup"),
    ('lr_drops=["a"]', "lr_drops must be a number, got str 'a'"),
    ("lr_drops=0.8", "lr_drops must be list, got float 0.8"),
    ("batch_size=many", "batch_size must be int, got str 'many'"),
    ("model_options.norm_layer=rms", "model_options must not hold norm_layer"),
]


@pytest.mark.parametrize("settings, message", MISTAKES)
def test_mistakes_of_newcomers_are_one_clear_line(places, tmp_path, capsys, settings, message):
    small = Config.of({"data": str(places["photos"]), "output_dir": str(tmp_path / "run"), **SETTINGS})
    path = command(small)[-1]
    assert cli.main(["pretrain", path, *settings.format(**places).split()]) == 1
    # that some pictures are skipped comes first
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipping ")]
    assert len(lines) == 1 and lines[0].startswith("fastmim: ") and message.format(**places) in lines[0]
    assert "drop_last" not in lines[0] and "settings changed" not in lines[0]
