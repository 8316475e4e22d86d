"""The mechanical part of the prose rules: first words of docstrings, and names that have a plainer word."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = "fastmim", "kernels", "tests", "benchmarks", "examples"

# a first line is a verb phrase or a noun phrase
CLAUSES = frozenset("what whether where of how why that who whose whom which when if".split())
# a name, and the one to use instead
ANYWHERE = {"said": "output, message or text", "there": "valid", "triton_room": "triton_module"}
FUNCTIONS = ANYWHERE | {"known": "valid", "wide": "upcast"}


def files() -> list[Path]:
    # fastmim/kernels is a link to kernels
    paths = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return sorted(paths | {ROOT / "setup.py"})


def bad_docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield "line: first line" for each docstring that opens with a clause."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            if text and text.split()[0].strip("`\"',.:;").lower() in CLAUSES:
                yield f"{node.body[0].lineno}: {text.splitlines()[0]}"


def bad_names(tree: ast.Module) -> Iterator[str]:
    """Yield "line: name: alternative" for each function, argument and assigned name that has a plainer word."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                better = FUNCTIONS.get(name)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                better = ANYWHERE.get(name)
            case _:
                continue
        if better:
            yield f"{node.lineno}: {name}: {better}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_names(path):
    tree = ast.parse(path.read_text())
    found = [*bad_docstrings(tree), *bad_names(tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        '"""What a run is."""',
        'class Model:\n    """\n    Whose weights are kept.\n    """',
        'def f():\n    """Whether it holds."""',
        'async def f():\n    """`Where` it stands."""',
        'class A:\n    def f(self):\n        def g():\n            """How: by looking."""',
        'def f():\n    """If, and only if."""',
    ],
)
def test_the_rule_sees_a_clause(source):
    assert list(bad_docstrings(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "said = f()",
        "def f():\n    total, said = g()",
        "with open(path) as said:\n    pass",
        "def f(said): pass",
        "f = lambda there: there",
        "for said in lines: pass",
        "x = [said for said in lines]",
        "if (said := f()): pass",
        "def triton_room(): pass",
        "class A:\n    async def wide(self): pass",
    ],
)
def test_the_rule_sees_a_name(source):
    assert list(bad_names(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Return whether it holds."""',
        '"""Whatever the device: one result."""',
        "def f():\n    pass",
        'x = """What a string that documents nothing says."""',
        "f(said=True)\ny = m.said",
        "wide = 3",
    ],
)
def test_the_rule_leaves_the_rest(source):
    tree = ast.parse(source)
    assert not [*bad_docstrings(tree), *bad_names(tree)]
