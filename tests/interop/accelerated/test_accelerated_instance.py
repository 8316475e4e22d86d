"""accelerate() changes the classes of one instance and nothing else; restore() undoes it."""

import copy
import pickle

import pytest
import torch
from accelerated_cases import accelerated, build, fast, gradients, kinds
from forked_mae import ForkedMAE
from torch import nn

import fastmim
from fastmim.interop.accelerate.api import UnsupportedModelError


def test_weights_stay(case):
    before = dict(case.model.state_dict(keep_vars=True))
    fastmim.accelerate(case.model)
    after = case.model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    attributes = {path: set(vars(module)) for path, module in case.model.named_modules()}
    fastmim.restore(case.model)
    assert attributes == {path: set(vars(module)) for path, module in case.model.named_modules()}


def test_other_models_are_untouched(case, request):
    before, classes = copy.deepcopy(case.model), kinds(case.model)
    methods = {cls: dict(vars(cls)) for cls in classes.values()}
    fastmim.accelerate(case.model)
    after = build(case.kind, request).model
    assert kinds(before) == kinds(after) == classes
    assert all(dict(vars(cls)) == names for cls, names in methods.items())
    again = type(case.model)
    assert isinstance(case.model, classes[""]) and again.__name__ == classes[""].__name__


def test_restore(case):
    classes, expected = kinds(case.model), case.run(case.model)
    report = fastmim.accelerate(case.model)
    assert fast(case.model) == list(report.accelerated) and "Fast" in repr(case.model)
    fastmim.restore(case.model)
    assert kinds(case.model) == classes and torch.equal(case.run(case.model)[0], expected[0])
    fastmim.restore(case.model)


def test_accelerating_again_starts_over(case):
    first = fastmim.accelerate(case.model)
    classes = kinds(case.model)
    assert fastmim.accelerate(case.model) == first and kinds(case.model) == classes


def test_explain_changes_nothing_and_reports_the_same(case):
    classes, state = kinds(case.model), torch.get_rng_state()
    report = fastmim.explain(case.model)
    assert kinds(case.model) == classes and torch.equal(torch.get_rng_state(), state)
    assert report == fastmim.accelerate(case.model) == fastmim.explain(case.model)
    assert all(description in str(report) for description in report.accelerated.values())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_accelerated_and_separate(case, how):
    fastmim.accelerate(case.model)
    twin = how(case.model)
    assert kinds(twin) == kinds(case.model)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.zero_()
    fastmim.restore(twin)
    expected = case.run(twin)[0]
    fastmim.accelerate(twin)
    assert torch.isclose(case.run(twin)[0], expected, rtol=1e-5)


def test_a_whole_model_is_saved(case, tmp_path):
    expected = case.run(accelerated(case.model))[0]
    torch.save(accelerated(case.model), tmp_path / "model.pt")
    assert torch.equal(case.run(torch.load(tmp_path / "model.pt", weights_only=False))[0], expected)


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "timm"])
def test_meta(kind, request):
    case = build(kind, request)
    moved = accelerated(case.model).to("meta")
    assert all(parameter.is_meta for parameter in moved.parameters())
    assert kinds(moved) == kinds(accelerated(case.model.to("meta")))


def test_results_are_not_compared_on_the_meta_device():
    with pytest.raises(UnsupportedModelError, match="its weights are on the meta device or sharded"):
        fastmim.accelerate(ForkedMAE().to("meta"))


def test_hooks_fire(case):
    fastmim.accelerate(case.model)
    called = []
    for path, module in case.model.named_modules():
        if isinstance(module, nn.LayerNorm) or path.endswith(("fc1", "attn", "attention", "mlp")):
            module.register_forward_hook(lambda *_, path=path: called.append(path))
            called.append(path)
    expected = sorted(called)
    called.clear()
    case.run(case.model)
    assert sorted(path for path in called) == [path for path in expected if path in called]
    assert {path for path in expected if "norm_pre" not in path and "fc_norm" not in path} <= set(called)


def test_hooks_change_results_as_before(case):
    """A value that a hook returns replaces the output."""
    for model in (case.model, twin := accelerated(case.model)):
        for path, module in model.named_modules():
            if path.endswith(("1.mlp.fc1", "1.attn.qkv", "0.attention.v_proj", "patch_embed.proj", "projection")):
                module.register_forward_hook(lambda module, args, out: 0.5 * out)
    assert torch.isclose(case.run(case.model)[0], case.run(twin)[0], rtol=1e-5)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "facebook", "timm"], indirect=True)
def test_compile(case):
    model = accelerated(case.model)
    expected = case.run(case.model)
    found = case.run(torch.compile(model, backend="aot_eager"))
    assert torch.isclose(found[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "facebook"], indirect=True)
def test_ddp_and_fsdp(case, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        expected = gradients(case, case.model)
        parallel = nn.parallel.DistributedDataParallel(accelerated(case.model))
        found = gradients(case, parallel)
        assert {name.removeprefix("module.") for name in found} == expected.keys()
        assert all(torch.allclose(found[f"module.{name}"], value, atol=1e-6) for name, value in expected.items())
        sharded = accelerated(case.model)
        for path in fast(sharded):
            if path.endswith((".0", ".1")):
                torch.distributed.fsdp.fully_shard(sharded.get_submodule(path))
        torch.distributed.fsdp.fully_shard(sharded)
        case.run(sharded)[0].backward()
        for name, parameter in sharded.named_parameters():
            if name in expected:
                assert torch.allclose(parameter.grad.full_tensor().double(), expected[name], atol=1e-6), name
        with pytest.raises(ValueError, match="fully_shard"):
            fastmim.restore(sharded)
    finally:
        torch.distributed.destroy_process_group()
