"""What is shipped, and that it works where the checkout is not."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STEP = """
import pathlib, sys, torch, fastmim
assert pathlib.Path(fastmim.__file__).is_relative_to(sys.argv[1]), fastmim.__file__
torch.manual_seed(0)
model = fastmim.MaskedAutoencoderViT(16, 4, 3, 16, 1, 2, 16, 1, 2)
images, noise = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.rand(2, 16)
before = model(images, noise=noise).loss
before.backward()
torch.optim.SGD(model.parameters(), lr=0.01).step()
assert model(images, noise=noise).loss < before
print(fastmim.__version__)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, the wheel built from it, and the wheel built from the checkout; pure Python, which is quick."""
    work = tmp_path_factory.mktemp("packaging")
    # a copy of what git knows or would add, so that the checkout stays clean and its build outputs stay out
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        source, copy = ROOT / name, work / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(source.readlink())
        elif source.is_file():
            copy.write_bytes(source.read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    for options in ([work / "sdist"], [work / "direct", "--wheel"]):
        run(*build, *options, work / "checkout", cwd=work, FASTMIM_BUILD_CPP="0")
    return (
        next((work / "sdist").glob("*.tar.gz")),
        next((work / "sdist").glob("*.whl")),
        next((work / "direct").glob("*.whl")),
    )


def test_the_wheel_holds_the_package_and_nothing_beside_it(built):
    _, wheel, _ = built
    files = names(wheel)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fastmim").rglob("*.py")}
    sources |= {f"fastmim/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert "fastmim/kernels/attention.py" in sources
    assert sources <= files
    assert "fastmim/py.typed" in files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)
    assert {name.partition("/")[0].partition("-")[0] for name in files} == {"fastmim"}


def test_a_wheel_is_the_same_by_way_of_the_sdist(built):
    _, by_sdist, direct = built
    assert by_sdist.name == direct.name
    assert names(by_sdist) == names(direct)
    sources = [
        {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
        for archive in map(zipfile.ZipFile, (by_sdist, direct))
    ]
    assert sources[0] == sources[1]


def test_the_sdist_holds_what_a_build_needs(built):
    sdist, _, _ = built
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md", "CHANGELOG.md", "fastmim/py.typed"} <= files
    rooms = [*(ROOT / "csrc").rglob("*"), *(ROOT / "kernels").rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in rooms if path.is_file()} <= files
    assert not any(name.startswith("fastmim/kernels/") for name in files)


def train_elsewhere(wheel: Path, work: Path, code: str = STEP) -> None:
    target = work / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run(*pip, "--target", target, wheel, cwd=work)
    # the explicit path comes before an editable installation of the checkout
    said = run(sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1]){code}", target, cwd=work)
    assert said.strip() == wheel.name.split("-")[1]


def test_installed_elsewhere_it_trains(built, tmp_path):
    _, wheel, _ = built
    train_elsewhere(wheel, tmp_path)


@pytest.mark.skipif(os.environ.get("FASTMIM_TEST_ALL") != "1", reason="compiles csrc/ once more: make test-all")
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++").split()[0]), reason="no C++ compiler")
def test_compiled_from_the_sdist_it_trains(built, tmp_path):
    sdist, _, _ = built
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    train_elsewhere(wheel, tmp_path, f"{STEP}assert fastmim._backends.build")
