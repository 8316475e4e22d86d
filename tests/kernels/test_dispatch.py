"""The order in which kernels are asked (the picture in `_dispatch`), and the lists that the order is made from."""

import importlib
import inspect
import pkgutil

import pytest
import torch

from fastmim import _backends, _dispatch, kernels, ops

# ---- CUDA tensors ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Pretend that Triton, which takes nothing, and CUDA C++, which takes single values, serve CUDA tensors.

    Return the backends that were asked.
    """
    calls = []

    def launcher(backend, op):
        def launch(x):
            calls.append(backend)
            if backend == "triton" or x.numel() > 1:
                raise kernels.Unserved(f"{backend} does not take it")
            return backend

        return launch

    monkeypatch.setattr(_backends, "triton_devices", ("cuda",))
    monkeypatch.setattr(_backends, "cuda_ops", frozenset({"attention", "gather_patches"}))
    monkeypatch.setattr(_dispatch, "launcher", launcher)
    monkeypatch.setattr(_dispatch, "CUDA_FIRST", {})
    return calls


def test_triton_goes_first_unless_a_result_says_otherwise(asked, monkeypatch):
    assert _dispatch.backends("attention") == ("triton", "cuda")
    assert _dispatch.backends("attention_varlen") == ("triton",)
    kernel = _dispatch.device_kernel("gather_patches", None)
    on_cpu = torch.zeros(1)
    assert kernel(on_cpu) == "cuda" and asked == ["triton", "cuda"]
    monkeypatch.setattr(_dispatch, "_capability", lambda device: [9, 0])
    monkeypatch.setattr(_dispatch, "CUDA_FIRST", {"capability": [9, 0], "sizes": {"gather_patches": [[]]}})
    assert kernel(on_cpu) == "cuda" and asked == ["triton", "cuda", "cuda"]
    # another card has not been measured
    monkeypatch.setattr(_dispatch, "_capability", lambda device: [8, 0])
    assert kernel(on_cpu) == "cuda" and asked[3:] == ["triton", "cuda"]


def test_sizes_decide_for_attention():
    q, k = torch.zeros(2, 5, 3, 32), torch.zeros(2, 7, 3, 32)
    qkv = torch.zeros(2, 5, 3, 4, 32)
    assert _dispatch.sizes_of("attention", (q, k, k, None)) == [5, 7, 32]
    assert _dispatch.sizes_of("attention_backward", (q, q, k, k, None)) == [5, 7, 32]
    assert _dispatch.sizes_of("attention_qkvpacked", (qkv, None)) == [5, 5, 32]
    assert _dispatch.sizes_of("attention_qkvpacked_backward", (qkv[:, :, 0], qkv, None)) == [5, 5, 32]
    assert _dispatch.sizes_of("random_masking", (2, 16)) == []


def test_without_triton_cuda_serves_its_devices(asked, monkeypatch):
    monkeypatch.setattr(_backends, "triton_devices", ())
    assert _dispatch.backends("attention") == ("cuda",) and _dispatch.devices("attention") == ("cuda",)
    assert _dispatch.device_kernel("attention_varlen", None) is None


def test_each_backend_is_asked_and_the_fallback_gets_all_reasons(asked):
    reasons = []
    kernel = _dispatch.device_kernel("attention", lambda *args, reason: reasons.append(reason))
    assert kernel(torch.zeros(1)) == "cuda" and asked == ["triton", "cuda"] and not reasons
    kernel(torch.zeros(2))
    assert reasons == ["triton does not take it; cuda does not take it"]


def test_older_devices_are_left_to_the_fallback(asked, monkeypatch):
    monkeypatch.setattr(_dispatch, "_capability", lambda device: [7, 5])
    kernel = _dispatch.device_kernel("attention", lambda *args, reason: reason)

    class OnOldDevice(torch.Tensor):
        device = torch.device("cuda", 0)

    assert kernel(torch.zeros(1).as_subclass(OnOldDevice)) == "needs compute capability 8.0" and not asked


def test_other_errors_are_not_taken_for_unserved(asked, monkeypatch):
    def launcher(backend, op):
        def launch(x):
            raise NotImplementedError("not served: of torch")

        return launch

    monkeypatch.setattr(_dispatch, "launcher", launcher)
    with pytest.raises(NotImplementedError, match="of torch"):
        _dispatch.device_kernel("attention", None)(torch.zeros(1))


# ---- the fallback ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_reference_is_the_fallback_unless_a_backend_is_forced(monkeypatch, backend):
    monkeypatch.setattr(_backends, "backend", backend)
    assert _dispatch.fallback("attention", lambda x: "reference")(torch.zeros(1), reason="why") == "reference"


@pytest.fixture
def cuda_is_forced(monkeypatch):
    """Pretend to be on a machine with the CUDA extension and FASTMIM_KERNELS=cuda."""
    monkeypatch.setattr(_backends, "backend", "cuda")
    monkeypatch.setattr(_backends, "missing", {"cpp": "x", "triton": "x"})
    monkeypatch.setattr(_backends, "cuda_ops", frozenset({"attention", "attention_backward"}))
    monkeypatch.setattr(_backends, "triton_devices", ())


def test_a_forced_backend_refuses_public_ops_that_it_has_a_kernel_of(cuda_is_forced, monkeypatch):
    assert _dispatch.backends("add_layer_norm") == () and _dispatch.backends("attention") == ("cuda",)
    serve = {op: _dispatch.fallback(op, lambda *args: "reference") for op in ("add_layer_norm", "attention")}
    tensor = torch.zeros(1)
    for fallback in serve.values():
        with pytest.raises(RuntimeError, match=r"cuda serves tensors on cuda devices, not on cpu"):
            fallback(tensor)
    # as if the tensor were on a GPU
    monkeypatch.setattr(_dispatch, "why_not", lambda device: "")
    assert serve["add_layer_norm"](tensor) == "reference"
    with pytest.raises(RuntimeError, match="can't serve fastmim::attention: heads are too wide"):
        serve["attention"](tensor, reason="heads are too wide")
    with _dispatch.reference_serves():
        assert serve["attention"](tensor, reason="heads are too wide") == "reference"


def test_a_forced_backend_refuses_no_internal_op(cuda_is_forced):
    fallback = _dispatch.fallback("attention_backward", lambda *args: "reference", internal=True)
    assert fallback(torch.zeros(1)) == fallback(torch.zeros(1), reason="heads are too wide") == "reference"


@pytest.mark.skipif(_backends.build is None, reason=f"no compiled kernels: {_backends.missing.get('cpp')}")
def test_cpu_kernels_hand_the_reason_to_the_fallback():
    """Replace the fallback of an op by one that returns the reason as a tensor of bytes."""
    library = torch.library.Library("fastmim_fallback", "IMPL")
    library.impl("bias_gelu", lambda x, bias, reason: torch.tensor(list(reason.encode())), "CPU")
    try:
        reasons = {
            dtype: bytes(torch.ops.fastmim.bias_gelu(torch.zeros(2, 3).to(dtype), torch.zeros(3)).tolist()).decode()
            for dtype in (torch.float64, torch.int32)
        }
    finally:
        library._destroy()
    assert reasons[torch.float64] == "float64 is served by the reference"
    assert reasons[torch.int32] == "this dtype is served by the reference"


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_triton_ops_are_the_launchers_of_the_modules():
    pytest.importorskip("triton")
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        names = vars(importlib.import_module(f"fastmim.kernels.{module.name}"))
        if launchers := {op for op in _backends.ops_in("fastmim") if inspect.isfunction(names.get(op))}:
            found[module.name] = launchers
    assert found == {module: set(ops) for module, ops in kernels.OPS.items()}


def test_triton_modules_have_the_names_of_the_modules_of_ops():
    for module, names in kernels.OPS.items():
        public = [getattr(ops, name) for name in names if name in ops.__all__]
        assert public and {op.__module__ for op in public} == {f"fastmim.ops.{module}"}


@pytest.mark.skipif(_backends.cuda_build is None, reason=f"no CUDA C++ kernels: {_backends.missing.get('cuda')}")
def test_cuda_ops_are_those_of_the_loaded_library():
    assert _backends.cuda_ops and _backends.cuda_ops <= _backends.ops_in("fastmim")
