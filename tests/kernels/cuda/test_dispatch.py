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
                raise NotImplementedError("not served: cuda does not want it\nsecond line")
            return name

        return launch if name == "triton" else _library.raising_unserved(launch)

    monkeypatch.setattr(_library, "triton_devices", ("cuda",))
    monkeypatch.setattr(_library, "cuda_build", {"torch": "x"})
    monkeypatch.setattr(_library, "launcher", launcher)
    monkeypatch.setattr(_library, "CUDA_FIRST", {})
    return calls


def test_triton_goes_first_unless_a_result_says_otherwise(both, monkeypatch):
    assert _library.families("attention") == ("triton", "cuda")
    assert _library.families("attention_varlen") == ("triton",)
    kernel = _library.device_kernel("gather_patches", None)
    on_cpu = torch.zeros(1)
    assert kernel(on_cpu) == "cuda" and both == ["triton", "cuda"]
    monkeypatch.setattr(_library, "_capability", lambda device: [9, 0])
    monkeypatch.setattr(_library, "CUDA_FIRST", {"capability": [9, 0], "sizes": {"gather_patches": [[]]}})
    assert kernel(on_cpu) == "cuda" and both == ["triton", "cuda", "cuda"]
    # another card has not been measured
    monkeypatch.setattr(_library, "_capability", lambda device: [8, 0])
    assert kernel(on_cpu) == "cuda" and both[3:] == ["triton", "cuda"]


def test_sizes_decide_for_attention():
    q, k = torch.zeros(2, 5, 3, 32), torch.zeros(2, 7, 3, 32)
    qkv = torch.zeros(2, 5, 3, 4, 32)
    assert _library.sizes_of("attention", (q, k, k, None)) == [5, 7, 32]
    assert _library.sizes_of("attention_backward", (q, q, k, k, None)) == [5, 7, 32]
    assert _library.sizes_of("attention_qkvpacked", (qkv, None)) == [5, 5, 32]
    assert _library.sizes_of("attention_qkvpacked_backward", (qkv[:, :, 0], qkv, None)) == [5, 5, 32]
    assert _library.sizes_of("random_masking", (2, 16)) == []


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


def test_an_error_of_torch_is_not_taken_for_one_of_them():
    library = torch.library.Library("fastmim_dispatch_test", "FRAGMENT")
    library.define("nothing(Tensor x) -> Tensor")
    with pytest.raises(NotImplementedError, match="Could not run"):
        _library.raising_unserved(torch.ops.fastmim_dispatch_test.nothing)(torch.zeros(1))
