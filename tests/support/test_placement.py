"""Faults that the op suite finds on "meta" tensors."""

from pathlib import Path

import pytest
import torch
from cases import take
from placement import placement, values_are_unknown

from fastmim import ops, reference


def here(*shape):
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize(
    "misplaced",
    [
        lambda: here(3) + torch.zeros(3),
        lambda: torch.where(torch.arange(3) == 2, 1.0, here(3)),
        lambda: here(3).masked_fill(torch.zeros(3, dtype=torch.bool), 0),
        lambda: here(3).tensor_split(here(2).long()),
        lambda: take(here(2, 3, 4), torch.zeros(2, 1, dtype=torch.int64)),
        lambda: reference.add_layer_norm(here(2, 4), here(2, 4), torch.ones(4), here(4), 1e-6),
        lambda: torch.equal(here(3), torch.zeros(3)),
    ],
)
def test_a_tensor_of_the_cpu_beside_one_of_the_device_is_refused(misplaced):
    with pytest.raises(RuntimeError, match=r"device|cpu"), placement(), values_are_unknown():
        misplaced()


def test_ops_are_their_formulas(monkeypatch):
    ids = here(2, 3).long()
    with placement():
        assert ops.gather_tokens(here(2, 5, 4), ids).shape == (2, 3, 4)
        monkeypatch.setattr(reference, "gather_tokens", lambda tokens, ids: tokens.cpu()[:, :3])
        with pytest.raises(RuntimeError, match="not as compilers are told"):
            ops.gather_tokens(here(2, 5, 4), ids)


def test_gradients_are_placed():
    with placement():
        tokens = here(2, 5, 4).requires_grad_()
        (grad,) = torch.autograd.grad(ops.gather_tokens(tokens, here(2, 3).long()).square().sum(), tokens)
        assert grad.shape == tokens.shape and grad.device.type == "meta"


def test_a_test_runs_on_where_it_reads_values_and_ends_where_it_can_not():
    seen = []
    with placement(), values_are_unknown():
        seen.append(float(here(3).sum()))
        assert torch.equal(here(3), here(3)) and here(3).sum() and here(2).long().tolist() == [1, 1]
        assert here(2, 3)[here(2, 3) > 0].shape == (6,)
        here(3).nonzero()
        seen.append("never")
    assert seen == [1.0]
    with pytest.raises(RuntimeError, match="wrong"), placement(), values_are_unknown():
        raise RuntimeError("wrong")


def test_a_test_ends_quietly_at_an_unexpected_value(tmp_path):
    def fail_in(path):
        exec(compile("assert False", str(path), "exec"))

    with values_are_unknown():
        fail_in(Path(__file__).parents[1] / "ops" / "test_loss.py")
    with pytest.raises(AssertionError), values_are_unknown():
        fail_in(tmp_path / "elsewhere.py")
