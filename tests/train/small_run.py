"""A run of about a second: its settings, its results, and its command."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fastmim.train import Config

SETTINGS = {
    "model": "tiny",
    "model_options": {
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "image_size": 16,
    "batch_size": 4,
    "max_steps": 12,
    "checkpoint_every": 4,
    "log_every": 1,
    "base_lr": 0.05,
    "device": "cpu",
    "backend": "pillow",
    "num_threads": 1,
}


def outcome(folder: Path) -> tuple[bytes, list[tuple]]:
    """Return the bytes of the final weights, and the metrics of each step but its speed."""
    return (folder / "final" / "model.safetensors").read_bytes(), curve(folder)


def curve(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[key] for key in ("step", "loss", "lr", "grad_norm", "skipped")) for line in lines]


def command(config: Config, *, processes: int = 1) -> list[str]:
    """Return the shell command of a run."""
    path = Path(config.output_dir).with_suffix(".toml")
    path.write_text("".join(f"{key} = {json.dumps(v)}\n" for key, v in flat(config.to_dict()) if v is not None))
    return [*torchrun(processes), "-m", "fastmim.cli", "pretrain", str(path)]


def torchrun(processes: int) -> list[str]:
    """Return the command that starts a script, or -m and a module, in so many processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def flat(settings: dict) -> list[tuple[str, object]]:
    """Return settings with the dotted keys of TOML."""
    pairs = []
    for key, value in settings.items():
        pairs += [(f"{key}.{k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]
    return pairs


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(config: Config, *, processes: int = 1) -> subprocess.CompletedProcess:
    """Run the command to its end."""
    done = subprocess.run(
        command(config, processes=processes), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done
