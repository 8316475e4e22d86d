"""Every recipe trains, is short, and has a row in docs/systems.md."""

import ast
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "examples" / "recipes").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loss_falls(path, recipe, capsys):
    module = recipe(path.stem)
    losses = module.train(*module.example(), steps=12)
    assert all(map(math.isfinite, losses))
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < first - 0.03 * abs(first), losses
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_short_and_names_its_paper(path):
    source = path.read_text()
    text = ast.get_docstring(ast.parse(source))
    assert text is not None and "Masked:" in text and "Paid for" in text
    lines = source.replace(text, "").splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert 15 <= len(code) <= 70, f"{len(code)} lines of code"


def test_every_recipe_has_a_row():
    page = (ROOT / "docs" / "systems.md").read_text()
    missing = [path.name for path in FILES if f"examples/recipes/{path.name})" not in page]
    assert not missing


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_runs_on_a_device(path, recipe):
    """Move model and batch to a device without values: nothing may stay on the CPU, and no value be read."""
    model, batch = recipe(path.stem).example()
    batch = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in batch]
    model.to("meta")(*batch).backward()
