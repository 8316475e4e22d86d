"""Who is asked first on CUDA devices, and what becomes of what nobody takes."""

import pytest
import torch

from fastmim import _library, kernels


@pytest.fixture
def both(monkeypatch):
    """Triton and CUDA C++, the second of which takes single values."""
    calls = []

    def launcher(name, op):
        def launch(x):
            calls.append(name)
            if name == "triton":
                raise kernels.Unserved("triton does not want it")
            if x.numel() > 1:
                raise NotImplementedError("cuda does not want it\nsecond line")
            return name

        return launch

    monkeypatch.setattr(_library, "triton_devices", ("cuda",))
    monkeypatch.setattr(_library, "cuda_build", {"torch": "x"})
    monkeypatch.setattr(_library, "_launcher", launcher)
    return calls


def test_triton_goes_first_unless_a_result_says_otherwise(both, monkeypatch):
    assert _library.families("attention") == ("triton", "cuda")
    assert _library.families("attention_varlen") == ("triton",)
    monkeypatch.setattr(_library, "CUDA_FIRST", ("attention",))
    assert _library.families("attention") == ("cuda", "triton")


def test_without_triton_cuda_serves_its_devices(both, monkeypatch):
    monkeypatch.setattr(_library, "triton_devices", ())
    assert _library.families("attention") == ("cuda",) and _library.devices("attention") == ("cuda",)
    assert _library.device_kernel("attention_varlen", None) is None


def test_what_one_leaves_the_next_takes_and_the_reference_gets_all_reasons(both):
    said = []
    kernel = _library.device_kernel("attention", lambda *args, reason: said.append(reason))
    assert kernel(torch.zeros(1)) == "cuda" and both == ["triton", "cuda"] and not said
    kernel(torch.zeros(2))
    assert said == ["triton does not want it; cuda does not want it"]
