"""Every recipe trains, is short, and has a row in docs/systems.md."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch

import fastmim
import fastmim.train

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "examples" / "recipes").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loss_falls(path, recipe, capsys):
    module = recipe(path.stem)
    losses = module.train(*module.example(), **dict(steps=12) | getattr(module, "TRAINING", {}))
    assert all(map(math.isfinite, losses))
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < first - 0.03 * abs(first), losses
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_short_and_names_its_paper(path):
    source = path.read_text()
    text = ast.get_docstring(ast.parse(source))
    assert text is not None and "Masked:" in text and "Paid for" in text
    assert 14 <= lines_of_code(source) <= 60


def lines_of_code(source: str) -> int:
    """Count the lines that are not blank, a comment, or of a docstring."""
    tree = ast.parse(source)
    texts = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            texts |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for row, line in lines if row not in texts)


# ---- docs/systems.md -------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "systems.md").read_text()
LINK = re.compile(r"\[(\w+)\]\(https://github.com/fastmim/fastmim/blob/main/examples/recipes/(\w+)\.py\)")


def rows(section: str) -> list[list[str]]:
    """Return the cells of the table rows in a part of the page."""
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| system |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_recipe_has_one_row():
    links = LINK.findall(PAGE)
    assert sorted(name for name, _ in links) == [path.stem for path in FILES]
    assert all(name == file for name, file in links)
    assert all(len(row) == 5 and all(row[:3]) and any(row[3:]) for row in rows(PAGE))


def test_models_and_configs_of_the_page_exist():
    section = PAGE[PAGE.index("## Models by name") : PAGE.index("## Images")]
    names = [name for row in rows(section) for name in re.findall(r"`(\w+)`", row[1])]
    assert len(names) > 15
    configs = {path.stem for path in (ROOT / "fastmim" / "train" / "configs").glob("*.toml")}
    assert [name for name in names if not hasattr(fastmim, name) and name not in configs] == []
    assert [name for row in rows(section) for name in re.findall(r"`([A-Z]\w+)`", row[2]) if not found(name)] == []


def found(name: str) -> bool:
    return hasattr(fastmim, name) or hasattr(fastmim.train, name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_row_agrees_with_its_file(path):
    """The paper is the one in the file's head, and the file uses what the row says."""
    row = next(row for row in rows(PAGE) if f"[{path.stem}]" in row[1])
    source = path.read_text()
    shared = re.findall(r"^from (_points|gmml|tera|tsmixer) import", source, re.M)
    every = source + "".join(path.with_stem(name).read_text() for name in shared)
    head = " ".join(ast.get_docstring(ast.parse(source)).partition("Masked:")[0].split())
    for paper in row[0].split("; "):
        authors, _, place = paper.rpartition(": ")[2].partition(", ")
        assert authors in head and place in head, (paper, head)
    for used in re.findall(r"`([^`]+)`", row[2]):
        module, _, name = re.match(r"[\w.]+", used)[0].rpartition(".")
        # a Mask is a variable
        assert re.search(rf"\b{name}\b", every, re.IGNORECASE), f"{path.name} does not use {used}"
        assert not module or hasattr(getattr(fastmim, module), name), f"there is no {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_runs_on_a_device(path, recipe):
    """Move model and batch to a device without values: nothing may stay on the CPU, and no value be read."""
    model, batch = recipe(path.stem).example()
    batch = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in batch]
    model.to("meta")(*batch).backward()
