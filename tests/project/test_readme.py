"""README and docs: each Python block runs, links have targets, and commands exist."""

import re
from pathlib import Path

import pytest

from fastmim import data, masking, nn, ops, train

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEXT = {path: path.read_text() for path in ALL}
REPOSITORY = re.compile(r"https://github\.com/fastmim/fastmim/(?:blob|tree)/main/")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT[path], flags=re.DOTALL)


def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", TEXT[path], flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=name)
def test_blocks_run(path, tmp_path, monkeypatch, capsys):
    """Run the blocks of a page in order, as one session."""
    # some write files
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for block in blocks(path):
        exec(compile(block, name(path), "exec"), session)
    if path.name == "README.md":
        assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("path", ALL, ids=name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        inside = REPOSITORY.match(link)
        target, _, anchor = link[inside.end() if inside else 0 :].partition("#")
        if "://" in target:
            continue
        place = ((ROOT if inside else path.parent) / target).resolve() if target else path
        assert place.exists(), f"{link} leads nowhere"
        # the site holds the pages of docs/ alone
        if path in DOCS and not inside:
            assert place.is_relative_to(ROOT / "docs"), f"{link} leaves the site: link to the repository"
        if anchor:
            assert anchor in anchors(place), f"{link}: {place.name} has no such heading"


def test_a_reader_of_the_readme_finds_each_page():
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 150
    for path in DOCS:
        start = ROOT / ("docs/index.md" if path.parent.name == "api" else "README.md")
        link = path.relative_to(start.parent).as_posix()
        assert f"]({link})" in TEXT[start], f"{start.name} does not link to {link}"
        assert f": {path.relative_to(ROOT / 'docs')}\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("path", ALL, ids=name)
def test_commands_exist(path):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", TEXT[path], flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, f"make {target}"
    for script in re.findall(r"\b(?:benchmarks|examples|tests)/[\w/]+\.(?:py|md|toml)\b", TEXT[path]):
        assert (ROOT / script).exists(), script


def test_the_readme_names_the_two_commands():
    assert {"throughput", "test"} <= set(re.findall(r"^make (\w+)", TEXT[ROOT / "README.md"], flags=re.MULTILINE))


def test_the_reference_names_what_a_submodule_hides():
    """Check names that mkdocstrings would take for the module of that name, as `fastmim.ops.attention`."""
    for module in (ops, masking, nn, data, train):
        page = (ROOT / "docs" / "api" / f"{module.__name__.rpartition('.')[2]}.md").read_text()
        assert f"::: {module.__name__}\n" in page
        for hidden in module.__all__:
            if (Path(module.__file__).parent / f"{hidden}.py").exists():
                assert f"::: {module.__name__}.{hidden}.{hidden}\n" in page
