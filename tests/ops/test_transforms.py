"""Derivatives that the ops don't have are refused in one line and never dropped; vmap is served."""

import pytest
import torch
from contract import host
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

from fastmim import ops

pytestmark = [host, pytest.mark.fault]
QKV = torch.randn(2, 5, 3, 2, 8, generator=torch.Generator().manual_seed(0))


def attend(x: Tensor) -> Tensor:
    return ops.attention_qkvpacked(x if x.dim() == 5 else x[None]).sum()


def dual(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return attend(forward_ad.make_dual(x, x))


ASKED = {
    "grad": grad(attend),
    "vjp": lambda x: vjp(attend, x),
    "jacrev": jacrev(attend),
    "hessian": hessian(attend),
    "jvp": lambda x: jvp(attend, (x,), (x,)),
    "vmap of grad": vmap(grad(attend)),
    "grad of vmap": grad(lambda x: vmap(attend)(x).sum()),
    "vmap of jvp": vmap(lambda x: jvp(attend, (x,), (x,))),
    "jvp of vmap": lambda x: jvp(vmap(attend), (x,), (x,)),
    "forward mode": dual,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("how", ASKED)
def test_other_derivatives_are_refused(how):
    message = r"fastmim::attention_qkvpacked is differentiable once, by backward\(\) and torch\.autograd\.grad\(\)"
    with pytest.raises(RuntimeError, match=message):
        ASKED[how](QKV)


@pytest.mark.parametrize(
    "op, arguments",
    [
        (ops.gather_tokens, [torch.randn(1, 4, 3), torch.tensor([[2, 0]])]),
        (lambda x: ops.embed_patches(torch.randn(1, 3, 4, 4), torch.zeros(1, 1).long(), x), [torch.randn(8, 3, 4, 4)]),
        (lambda x: ops.add_layer_norm(x, x, x[0], x[0])[0], [torch.randn(2, 4)]),
        (ops.bias_gelu, [torch.randn(2, 4), torch.randn(4)]),
        (lambda x: ops.pixel_loss(x, torch.randn(1, 3, 4, 4), torch.zeros(1, 1).long(), 4), [torch.randn(1, 1, 48)]),
        (lambda x: ops.scaled_cosine_loss(x, x.flip(0)), [torch.randn(2, 4, 8)]),
    ],
)  # fmt: skip
def test_of_every_op(op, arguments):
    with pytest.raises(RuntimeError, match=r"fastmim::\w+ is differentiable"):
        grad(lambda x: op(x, *arguments[1:]).sum())(arguments[0])
    with pytest.raises(RuntimeError, match=r"fastmim::\w+ is differentiable"):
        jvp(lambda x: op(x, *arguments[1:]), tuple(arguments[:1]), tuple(arguments[:1]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_no_derivative_is_asked_of_is_served():
    torch.testing.assert_close(vmap(attend)(QKV), torch.stack([attend(x) for x in QKV]))
    scale = torch.ones(())
    assert grad(lambda scale: scale * attend(QKV))(scale) == attend(QKV)
    with forward_ad.dual_level():
        assert attend(QKV) == attend(QKV)
    noise = torch.rand(3, 16)
    ids = vmap(lambda x: ops.random_masking(1, 16, 4, noise=x[None])[0][0])(noise)
    assert torch.equal(ids, ops.random_masking(3, 16, 4, noise=noise)[0])
