"""Take one training step of everything that users copy: the README's first block, the examples, the quickstart.

python tests/support/one_step.py [cpu|cuda]

Programs that choose no device run on the given one. Each is named once its step is done; the first that fails ends it.
"""

import re
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastmim import cli

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "support"))
from torchvision_stub import torchvision  # noqa: E402

README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


class Stepped(Exception):
    """Raised when an optimiser has taken a step."""


def until_a_step(program: Callable[[], object]) -> None:
    """Run `program` to the end of its first step."""

    def stop(*_: object) -> None:
        raise Stepped

    hook = register_optimizer_step_post_hook(stop)
    try:
        program()
    except Stepped:
        return
    finally:
        hook.remove()
    raise AssertionError("it ended without a step")


def example(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def readme() -> None:
    exec(compile(README[0], "README.md", "exec"), {})


def timm() -> None:
    with torchvision():
        example("accelerate_timm.py")


def train_mae(folder: str) -> None:
    for number in range(2):
        Image.linear_gradient("L").resize((40, 32)).convert("RGB").save(f"{folder}/{number}.png")
    sizes = ["--steps", "1", "--batch-size", "2", "--image-size", "32"]
    example("train_mae.py", folder, *sizes, "--out", f"{folder}/grid.png")


def quickstart(folder: str) -> None:
    sizes = ["batch_size=2", "max_steps=1", "reconstruct_every=1", "model_options.depth=2"]
    assert cli.main(["pretrain", "quickstart_cpu", f"output_dir={folder}/run", *sizes]) == 0


def main(device: str) -> None:
    with torch.device(device):
        for name, program in {
            "README.md": readme,
            "drop_in.py": lambda: example("drop_in.py"),
            "feature_targets.py": lambda: example("feature_targets.py"),
            "accelerate_timm.py": timm,
        }.items():
            until_a_step(program)
            print(name, flush=True)
    until_a_step(lambda: example("accelerate_huggingface.py"))
    print("accelerate_huggingface.py", flush=True)
    for name, whole in {"train_mae.py": train_mae, "quickstart_cpu": quickstart}.items():
        with tempfile.TemporaryDirectory() as folder:
            whole(folder)
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cpu"])
