"""Imports between parts of fastmim, public names, documented arguments, and side effects of importing fastmim."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmim
from fastmim import losses, masking, ops, reference

ROOT = Path(fastmim.__file__).parent.parent

# ---- imports between parts -------------------------------------------------------------------------------------------

# a part may import itself and the parts of earlier layers, but not those that share its layer
LAYERS = "reference", "ops", "losses masking", "nn", "models", "interop", "train", "__init__", "info", "cli", "__main__"
LAYER = {part: layer for layer, parts in enumerate(LAYERS) for part in parts.split()}
SHARED = {
    "_autocast",
    "_backends",
    "_checks",
    "_dispatch",
    "_files",
    "_patches",
    "_version",
}  # may be imported by every part that imports fastmim at all
NATIVE = {"kernels", "_C", "_CUDA", "_PLANS"}


def imports(source: str, package: str) -> set[str]:
    """Return the full dotted names that `source`, a module of `package`, imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def may_import(part: str, name: str) -> bool:
    """Return whether a module of `part` may import the dotted name."""
    top, _, rest = name.partition(".")
    if top in sys.stdlib_module_names or top == "torch":
        return True
    if top != "fastmim":
        return top == "triton" if part == "kernels" else top != "triton" and part != "reference"
    other = rest.partition(".")[0]
    if other == part:
        return True
    if other in NATIVE:
        return part in ("_backends", "_dispatch")
    if part in ("reference", "kernels"):
        return False
    if other in SHARED:
        return True
    if part in ("data", *SHARED):
        return False
    if other == "data":
        return part in ("train", "__init__", "info", "cli")
    # any other name is one of fastmim/__init__.py
    return LAYER.get(other, LAYER["__init__"]) < LAYER[part]


def modules() -> list[Path]:
    return sorted([*(ROOT / "fastmim").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    inside = path.relative_to(ROOT).with_suffix("").parts
    part = inside[0] if inside[0] == "kernels" else inside[1]
    package = ".".join((("fastmim",) if inside[0] == "kernels" else ()) + inside[:-1])
    forbidden = {name for name in imports(path.read_text(), package) if not may_import(part, name)}
    assert not forbidden, f"{part} must not import {forbidden}"


@pytest.mark.parametrize(
    "part, source",
    [
        ("reference", "from .._checks import axes"),
        ("reference", "import numpy"),
        ("ops", "from ..nn import Block"),
        ("ops", "from .. import kernels"),
        ("ops", "import fastmim.masking"),
        ("nn", "from ..models.mae import MAEOutput"),
        ("models", "def late():\n    from ..interop import huggingface"),
        ("interop", "from ..train import loop"),
        ("models", "import fastmim"),
        ("data", "from .. import ops"),
        ("info", "import fastmim.kernels.patches"),
        ("models", "from fastmim import _C"),
        ("ops", "from fastmim import _CUDA"),
        ("nn", "import triton.language as tl"),
        ("kernels", "from fastmim._backends import backend"),
        ("kernels", "import numpy"),
        ("_checks", "from . import ops"),
    ],
)
def test_forbidden_imports_are_found(part, source):
    package = "fastmim" if part.startswith("_") or part == "info" else f"fastmim.{part}"
    assert not all(may_import(part, name) for name in imports(source, package))


# ---- public names ----------------------------------------------------------------------------------------------------


def test_public_names():
    assert fastmim.__all__ == sorted(fastmim.__all__) == [
        "CroCo",
        "CropMAE",
        "CrossMAE",
        "Encoder",
        "MAEOutput",
        "Mask",
        "MaskedAutoencoder",
        "MaskedAutoencoderViT",
        "Patches",
        "Pixio",
        "SimMIM",
        "UnsupportedModelError",
        "VideoMAE",
        "__version__",
        "accelerate",
        "croco2_vit_base_patch16",
        "croco2_vit_large_patch16",
        "croco_vit_base_patch16",
        "cropmae_vit_base_patch16",
        "cropmae_vit_small_patch16",
        "crossmae_vit_base_patch16",
        "crossmae_vit_large_patch16",
        "crossmae_vit_small_patch16",
        "data",
        "explain",
        "from_huggingface",
        "load",
        "losses",
        "mae_vit_base_patch16",
        "mae_vit_huge_patch14",
        "mae_vit_large_patch16",
        "mae_vit_small_patch16",
        "mae_vit_tiny_patch16",
        "masking",
        "ops",
        "pixio_vit_base_patch16",
        "pixio_vit_huge_patch16",
        "pixio_vit_large_patch16",
        "restore",
        "simmim_vit_base_patch16",
        "to_facebook",
        "to_huggingface",
        "to_timm",
        "to_videomae",
        "videomae_vit_base_patch16",
        "videomae_vit_giant_patch14",
        "videomae_vit_huge_patch16",
        "videomae_vit_large_patch16",
        "videomae_vit_small_patch16",
    ]  # fmt: skip
    assert ops.__all__ == [
        "add_layer_norm",
        "attention",
        "attention_qkvpacked",
        "attention_varlen",
        "bias_gelu",
        "decoder_tokens",
        "embed_patches",
        "gather_patches",
        "gather_tokens",
        "pixel_loss",
        "random_masking",
        "scaled_cosine_loss",
        "unshuffle",
    ]


@pytest.mark.parametrize("name", [name for name in fastmim.__all__ if name != "__version__"])
def test_public_names_are_documented(name):
    docstring = inspect.getdoc(getattr(fastmim, name))
    # a dataclass writes its own docstring, which is its signature
    assert docstring and not docstring.startswith(f"{name}(")


OPS = [getattr(ops, name) for name in ops.__all__]
LOSSES = [getattr(losses, name) for name in losses.__all__]
MASKS = [
    masking.uniform,
    masking.random,
    masking.from_scores,
    masking.weighted,
    masking.hardest,
    masking.cells,
    masking.blocks,
    masking.from_bool,
    masking.tube,
    masking.running_cell,
]


@pytest.mark.parametrize(
    "function",
    [
        *OPS,
        *MASKS,
        fastmim.Encoder.encode,
        fastmim.MaskedAutoencoder.forward,
        fastmim.MaskedAutoencoder.decode,
        fastmim.MaskedAutoencoder.loss,
        *LOSSES,
        fastmim.MaskedAutoencoderViT.forward,
        fastmim.load,
        fastmim.interop.xformers.memory_efficient_attention,
    ],
    ids=lambda function: function.__qualname__,
)
def test_docstrings_have_arguments_results_and_errors(function):
    docstring = inspect.getdoc(function)
    sections = ["Args:", "Returns:", "Raises:"] if function in [*OPS, *MASKS, *LOSSES] else ["Args:", "Raises:"]
    assert all(section in docstring for section in sections)
    arguments = docstring.partition("Args:")[2].partition("Raises:")[0]
    missing = [name for name in inspect.signature(function).parameters if name != "self" and name not in arguments]
    assert not missing


def test_ops_take_options_by_keyword():
    """Check that tensors are positional and options keywords, as the design says."""
    keywords = {
        name: [p.name for p in inspect.signature(getattr(ops, name)).parameters.values() if p.kind == p.KEYWORD_ONLY]
        for name in ops.__all__
    }
    assert keywords == {
        "add_layer_norm": ["eps"],
        "attention": ["key_mask", "bias", "scale"],
        "attention_qkvpacked": ["key_mask", "scale"],
        "attention_varlen": ["scale"],
        "bias_gelu": [],
        "decoder_tokens": ["num_prefix_tokens"],
        "embed_patches": ["pos_embed", "pos_ids", "prefix", "mean", "std"],
        "gather_patches": ["mean", "std", "dtype"],
        "gather_tokens": [],
        "pixel_loss": ["norm_pix", "weight", "mean", "std", "loss", "reduction"],
        "random_masking": ["len_predict", "noise", "seeds", "generator", "device"],
        "scaled_cosine_loss": ["gamma", "weight", "reduction"],
        "unshuffle": ["num_prefix_tokens"],
    }


REGISTERED = sorted(
    name.removeprefix("fastmim::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastmim::")
)


@pytest.mark.parametrize("name", REGISTERED)
def test_every_op_has_its_reference_as_fallback(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmim::{name}", "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmim::{name}", "Meta")
    schema = getattr(torch.ops.fastmim, name).default._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(getattr(reference, name)).parameters)


def test_every_public_op_is_registered():
    assert set(ops.__all__) <= set(REGISTERED)


# ---- side effects of importing ---------------------------------------------------------------------------------------


def python(code: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter without FASTMIM_ and TRITON_ settings but those given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTMIM_", "TRITON_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or not check, done.stderr
    return done


STEP = """
import torch, fastmim
model = fastmim.MaskedAutoencoderViT(16, 4, 3, 16, 1, 2, 16, 1, 2)
model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""


def test_importing_does_nothing_else():
    done = python("""
import json, os, sys, time
import numpy, torch

def refuse(*args, **kwargs):
    raise AssertionError("importing fastmim started CUDA or wrote to the environment")

# not by comparing values: this process has inherited what importing fastmim may have set in its parent
torch.cuda._lazy_init = os.putenv = os.unsetenv = refuse
watched = (torch, torch.Tensor, torch.nn, torch.nn.functional, torch.nn.Module, torch.autograd, torch.optim, numpy)
before = [dict(vars(owner)) for owner in watched]
functional, modules = set(vars(torch.nn.functional)), set(sys.modules)
threads, default = torch.get_num_threads(), torch.get_default_dtype()
start = time.process_time()
import fastmim
seconds = time.process_time() - start
print(json.dumps({
    "seconds": seconds,
    "packages": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
    "patched": [
        f"{owner.__name__}.{name}" for owner, names in zip(watched, before)
        for name, value in names.items() if vars(owner).get(name) is not value
    ],
    "added": sorted(set(vars(torch.nn.functional)) - functional),
    "settings": (torch.get_num_threads(), torch.get_default_dtype()) != (threads, default),
    "cuda": torch.cuda.is_initialized(),
}))
""")
    found = json.loads(done.stdout)
    assert found.pop("seconds") < 1
    assert [name for name in found.pop("packages") if name not in sys.stdlib_module_names] == ["fastmim"]
    assert found == {"patched": [], "added": [], "settings": False, "cuda": False}
    assert not done.stderr


def test_works_where_triton_can_not_be_imported():
    python("import sys; sys.modules['triton'] = None" + STEP)


def test_an_unknown_backend_is_refused_at_import():
    done = python("import fastmim", check=False, FASTMIM_KERNELS="bogus")
    assert done.returncode
    assert "ValueError: FASTMIM_KERNELS must be one of auto, reference, cpp, triton, cuda; got 'bogus'" in done.stderr


def test_the_reference_serves_everything():
    python(STEP, FASTMIM_KERNELS="reference")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_forced_backend_that_can_not_serve_a_tensor_raises_at_the_call(backend):
    done = python(STEP, check=False, FASTMIM_KERNELS=backend)
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    # the op, then the reason
    assert (
        last.startswith(f"RuntimeError: FASTMIM_KERNELS={backend} can't serve fastmim::") and len(last.split(": ")) >= 3
    )
