"""Accelerated models with hooks, adapters, torch.func, forward-mode AD or replicas."""

import copy

import pytest
import torch
from accelerated_cases import accelerated, build, fast
from forked_mae import ForkedMAE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import scatter_gather

import fastmim
from fastmim.interop.accelerate.api import UnsupportedModelError

pytestmark = pytest.mark.fault


def check_as_before(case, change) -> None:
    """Apply `change` to a model and to its accelerated copy, and check that their results stay equal."""
    model, twin = case.model, accelerated(case.model)
    untouched = case.run(model)[0]
    for altered in (model, twin):
        change(altered)
    expected, found = case.run(model)[0], case.run(twin)[0]
    assert not torch.isclose(expected, untouched, rtol=1e-4)
    assert torch.isclose(found, expected, rtol=1e-5)


ACTIVATIONS = ("mlp.act", "mlp.activation_fn")


@pytest.mark.parametrize("change", ["hook", "replaced"])
@pytest.mark.parametrize(
    "case", ["ViTMAEForPreTraining", "ViTModel", "facebook", "facebook, timm", "timm"], indirect=True
)
def test_activations(case, change):
    def alter(model):
        for path, module in list(model.named_modules()):
            if path.endswith(ACTIVATIONS) and change == "hook":
                module.register_forward_hook(lambda module, args, out: 0.5 * out)
            elif path.endswith(ACTIVATIONS):
                model.set_submodule(path, nn.ReLU())

    check_as_before(case, alter)


@pytest.mark.parametrize("part", ["drop1", "norm", "drop2", "attn_drop", "proj_drop", "q_norm"])
@pytest.mark.parametrize("case", ["timm", "lightly"], indirect=True)
def test_parts_that_were_idle(case, part):
    def alter(model):
        for path, module in list(model.named_modules()):
            if path.endswith(f".{part}") and ("attn." in path or "mlp." in path):
                # PyTorch's attention is given the rate of the dropout, which is not called
                if part == "attn_drop":
                    module.p = 0.9
                else:
                    module.register_forward_hook(lambda module, args, out: 0.5 * out)

    case.model.train()
    check_as_before(case, alter)


class OneRow(nn.Module):
    """A sum over tokens, to be added to each of them."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *args, **named) -> Tensor:
        out = self.attention(x, *args, **named)
        return (out[0].sum(1, keepdim=True), *out[1:]) if isinstance(out, tuple) else out.sum(1, keepdim=True)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "ViTModel", "facebook", "timm"], indirect=True)
def test_attention_with_one_row_for_all_tokens(case):
    def alter(model):
        for path, module in list(model.named_modules()):
            if path.endswith((".attn", ".attention")) and path.count(".") < 4:
                model.set_submodule(path, OneRow(module))

    check_as_before(case, alter)


def half_noise(model: nn.Module) -> None:
    owner = next(module for module in model.modules() if hasattr(module, "random_masking"))
    theirs = owner.random_masking
    owner.random_masking = lambda x, *args: tuple(
        0.5 * out if index == 0 else out for index, out in enumerate(theirs(x, *args))
    )


def double_target(model: nn.Module) -> None:
    model.patchify = lambda images, theirs=model.patchify, **how: 2 * theirs(images, **how) ** 3


@pytest.mark.parametrize("alter", [half_noise, double_target])
@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "facebook"], indirect=True)
def test_methods_replaced_on_the_instance_later(case, alter):
    check_as_before(case, alter)


@pytest.mark.parametrize("case", ["facebook, timm", "lightly"], indirect=True)
def test_a_hook_on_the_norm_of_patches(case):
    def alter(model):
        for path, module in model.named_modules():
            if path.endswith("patch_embed.norm"):
                module.register_forward_hook(lambda module, args, out: 0.5 * out)

    check_as_before(case, alter)


def test_a_projection_without_out_features(request):
    case = build("timm", request)
    qkv = nn.Sequential(nn.Linear(32, 96))
    check_as_before(case, lambda model: model.set_submodule("blocks.0.attn.qkv", copy.deepcopy(qkv)))


@pytest.mark.parametrize("before", [True, False])
def test_peft(case, before):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, target_modules=r".*(qkv|proj|projection|q_proj|v_proj|fc1|fc2|decoder_embed)"
    )
    torch.manual_seed(0)
    expected_model = peft.inject_adapter_in_model(config, copy.deepcopy(case.model))
    found_model = copy.deepcopy(expected_model) if before else accelerated(case.model)
    if before:
        fastmim.accelerate(found_model, strict=False)
    else:
        found_model = peft.inject_adapter_in_model(config, found_model)
        found_model.load_state_dict(expected_model.state_dict())
    untouched, expected, found = (case.run(model) for model in (case.model, expected_model, found_model))
    assert not torch.isclose(untouched[0], expected[0], rtol=1e-4)
    assert torch.isclose(found[0], expected[0], rtol=1e-5)
    found[0].backward()
    # an adapter in a part that the model does not call has no gradient, accelerated or not
    expected[0].backward()
    for (name, a), b in zip(expected_model.named_parameters(), found_model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name


# ---- global hooks ----------------------------------------------------------------------------------------------------


def test_a_global_hook_sees_the_same_modules(case):
    seen = []
    for model in (case.model, accelerated(case.model)):
        paths, found = {module: path for path, module in model.named_modules()}, []
        handle = register_module_forward_hook(lambda m, a, o, paths=paths, found=found: found.append(paths.get(m)))
        try:
            case.run(model)
        finally:
            handle.remove()
        seen.append(sorted(filter(None, found)))
    assert seen[0] == seen[1]


def test_results_are_not_compared_under_a_global_hook():
    model, handle = ForkedMAE(), register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedModelError, match=r"a global module hook or torch\.func is active"):
            fastmim.accelerate(model)
    finally:
        handle.remove()
    assert "" in fastmim.accelerate(model).accelerated


# ---- other derivatives -----------------------------------------------------------------------------------------------

# PyTorch's fused attention has no such derivatives
math_attention = sdpa_kernel(SDPBackend.MATH)


@math_attention
def test_torch_func(case):
    """The model's own code runs, with the same derivatives."""
    predicts = case.kind in ("ViTMAEForPreTraining", "facebook")
    model = accelerated(case.model, predict="masked" if predicts else "all")
    weights = {name: p.detach() for name, p in case.model.named_parameters()}

    class Run(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return case.run(self.model, images)[0]

    def loss(model):
        run = Run(model)
        return lambda weights, images: functional_call(run, {f"model.{n}": w for n, w in weights.items()}, images)

    found, expected = (grad(loss(m))(weights, case.images) for m in (model, case.model))
    for name in weights:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6), name
    tangents = {name: torch.ones_like(value) for name, value in weights.items()}
    (_, found), (_, expected) = (
        jvp(lambda w, m=m: loss(m)(w, case.images), (weights,), (tangents,)) for m in (model, case.model)
    )
    assert torch.isclose(found, expected, rtol=1e-4) and found != 0


@pytest.mark.parametrize("case", ["ViTMAEModel", "facebook", "timm"], indirect=True)
@math_attention
def test_gradients_of_each_sample(case):
    weights = {name: p.detach() for name, p in case.model.named_parameters()}

    def loss(model, weights, image):
        out = functional_call(model, weights, image[None])
        return out[0].mean() if case.kind != "ViTMAEModel" else out.last_hidden_state.square().mean()

    grads = []
    for model in (case.model, accelerated(case.model)):
        torch.manual_seed(0)
        each = vmap(grad(lambda w, x, m=model: loss(m, w, x)), (None, 0), randomness="same")
        grads.append(each(weights, case.images))
    for name in weights:
        assert torch.allclose(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6), name


@math_attention
def test_forward_mode(case):
    tangents = []
    for model in (case.model, accelerated(case.model)):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(case.images, torch.ones_like(case.images))
            tangents.append(forward_ad.unpack_dual(case.run(model, dual)[0]).tangent)
    assert tangents[0] and torch.isclose(*tangents, rtol=1e-4)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "timm"], indirect=True)
def test_the_model_is_fast_again_after_vmap(case):
    model = accelerated(case.model)
    vmap(lambda x: x)(case.images)
    names = {node.name() for node in nodes(case.run(model)[0].grad_fn)}
    assert any("_NormLinear" in name for name in names) and any("fastmim_attention" in name for name in names)


def nodes(root) -> set:
    found, left = set(), [root]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize(
    "case", ["ViTMAEForPreTraining", "ViTModel", "facebook", "facebook, timm", "timm"], indirect=True
)
def test_a_compiled_model_is_one_graph_of_fast_ops(case):
    torch.compiler.reset()
    graphs = []

    def keep(module, inputs):
        graphs.append(module.code)
        return module

    case.run(torch.compile(accelerated(case.model), fullgraph=True, backend=keep), case.images)
    assert len(graphs) == 1 and "fastmim.attention" in graphs[0] and "scaled_dot_product" not in graphs[0]


# ---- replicas --------------------------------------------------------------------------------------------------------


def replicate(model: nn.Module) -> nn.Module:
    """Replicate as torch.nn.parallel.replicate does, which needs GPUs: parameters become attributes, not leaves."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            setattr(replica, key, child and replicas[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.view_as(parameter))
    return replicas[model]


class Gather:
    """Stand-in for torch's Gather on CPU tensors."""

    @staticmethod
    def apply(device: object, dim: int, *parts: Tensor) -> Tensor:
        return torch.cat([part.view(1) if part.dim() == 0 else part for part in parts], dim)


def test_replicas(case, monkeypatch):
    monkeypatch.setattr(scatter_gather, "Gather", Gather)
    model = accelerated(case.model)
    replica = replicate(model)
    assert fast(replica) == fast(model) and type(replica) is type(model)
    expected, found = (case.run(each, case.images) for each in (model, replica))
    assert torch.equal(found[0], expected[0])
    found[0].backward()
    replicated = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected[0].backward()
    assert replicated and all(
        torch.equal(p.grad, replicated[n]) for n, p in model.named_parameters() if n in replicated
    )
    assert scatter_gather.gather([found[0], expected[0]], "cpu").shape == (2,)


def test_a_new_model_of_an_accelerated_class_is_not_accelerated():
    model = ForkedMAE()
    fastmim.accelerate(model)
    assert type(type(model)()) is ForkedMAE
