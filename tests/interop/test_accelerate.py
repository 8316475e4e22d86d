"""accelerate() changes what an instance runs and nothing that it computes; restore() undoes it."""

import copy
import pickle
import sys
import warnings
from abc import ABC
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from forked_mae import Block, PlainMAE
from torch import Tensor, nn

import fastmim
from fastmim.interop.accelerate import UnsupportedModelError
from fastmim.interop.accelerated.swap import Fast

transformers = pytest.importorskip("transformers")

SIZES = dict(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=40,
    norm_pix_loss=True,
)  # fmt: skip


@dataclass
class Case:
    """A model and how to run it: a scalar to minimise first, then all else that it returns."""

    model: nn.Module
    images: Tensor
    noise: Tensor
    family: str

    def run(self, model: nn.Module, images: Tensor | None = None) -> tuple[Any, ...]:
        dtype = next(model.parameters()).dtype
        images = self.images.to(dtype) if images is None else images
        torch.manual_seed(7)
        if self.family == "ViTMAEForPreTraining":
            out = model(images, noise=self.noise)
            return out.loss, out.logits, out.mask, out.ids_restore
        if self.family == "ViTMAEModel":
            out = model(images)
            return score(out.last_hidden_state), out.last_hidden_state, out.mask, out.ids_restore
        if self.family == "ViTModel":
            out = model(images)
            return score(out.last_hidden_state), out.last_hidden_state, out.pooler_output
        if self.family == "lightly":
            keep = torch.cat([torch.zeros(len(images), 1, dtype=torch.long), 1 + self.noise.argsort(1)[:, :5]], 1)
            out = model.encode(images, idx_keep=keep)
            return score(out), out
        if self.family == "timm":
            out = model(images)
            return score(out), out
        return model(images, 0.7)


def score(out: Tensor) -> Tensor:
    """A scalar that a final layer norm doesn't make constant."""
    return (out.square() * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).mean()


def build(family: str, request: pytest.FixtureRequest, **changes: Any) -> Case:
    """A float32 model whose parameters are away from their initial values."""
    torch.manual_seed(0)
    if family.startswith("ViT"):
        kind = getattr(transformers, family)
        names = transformers.ViTConfig().to_dict().keys() if family == "ViTModel" else {*SIZES, *changes}
        config = "ViTConfig" if family == "ViTModel" else "ViTMAEConfig"
        settings = {key: value for key, value in {**SIZES, **changes}.items() if key in names}
        model = kind(getattr(transformers, config)(**settings))
    elif family == "plain":
        model = PlainMAE(**changes)
    else:
        timm = request.getfixturevalue("timm")
        sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
        model = timm.models.VisionTransformer(**{**sizes, **changes})
        if family == "lightly":
            model = request.getfixturevalue("lightly_modules").MaskedVisionTransformerTIMM(model)
        if family == "timm blocks":
            layers = timm.models.vision_transformer
            model = PlainMAE(block=partial(layers.Block, qkv_bias=True), patch_embed=layers.PatchEmbed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return Case(model, torch.randn(3, 3, 32, 32), torch.rand(3, 16), family)


FAMILIES = ["ViTMAEForPreTraining", "ViTMAEModel", "ViTModel", "plain", "timm blocks", "timm", "lightly"]


@pytest.fixture(params=FAMILIES)
def case(request) -> Case:
    return build(request.param, request)


@pytest.fixture
def hugging(request) -> Case:
    return build("ViTMAEForPreTraining", request)


def accelerated(model: nn.Module, **how: Any) -> nn.Module:
    """A copy, accelerated."""
    model = copy.deepcopy(model)
    fastmim.accelerate(model, **how)
    return model


def gradients(case: Case, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    case.run(model)[0].backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def kinds(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def fast(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Fast)]


# ---- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_results_agree(case, training):
    case.model.train(training)
    expected, found = case.run(case.model), case.run(accelerated(case.model))
    assert abs(found[0] - expected[0]) <= 1e-6 * abs(expected[0])
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.is_floating_point():
            assert (a - b).abs().max() <= 3e-6 * b.abs().max()
        else:
            assert torch.equal(a, b)


def test_gradients_are_as_near_to_float64(case):
    exact = gradients(case, copy.deepcopy(case.model).double())
    plain, found = gradients(case, case.model), gradients(case, accelerated(case.model))
    assert found.keys() == plain.keys() == exact.keys()
    largest = max(value.norm() for value in exact.values())
    for name, value in exact.items():
        floor = 1e-7 * largest
        assert (found[name] - value).norm() <= 2 * (plain[name] - value).norm() + floor, name


def test_float64_agrees_exactly_but_for_rounding(case):
    model = case.model.double()
    expected, found = gradients(case, model), gradients(case, accelerated(model))
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * largest, name


def test_every_patched_module_agrees(case):
    """One at a time, on what it gets in a run of the whole."""
    calls: dict[str, tuple[tuple, dict, Any]] = {}

    def record(path):
        def hook(module, args, kwargs, out):
            calls[path] = args, kwargs, out

        return hook

    model = case.model.double()
    report = fastmim.explain(model)
    hooks = [model.get_submodule(p).register_forward_hook(record(p), with_kwargs=True) for p in report.accelerated if p]
    case.run(model)
    for hook in hooks:
        hook.remove()
    alone = accelerated(model)
    for path, (args, kwargs, expected) in calls.items():
        # where noise is drawn, nothing has been before
        torch.manual_seed(7)
        found = alone.get_submodule(path)(*args, **kwargs)
        found, expected = (out if isinstance(out, (tuple, list)) else (out,) for out in (found, expected))
        if isinstance(expected[0], Tensor):
            assert torch.allclose(found[0], expected[0], rtol=1e-10, atol=1e-10), path
    assert len(calls) >= 6


def curve(case: Case, model: nn.Module, steps: int) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = case.run(model)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "plain"], indirect=True)
def test_a_hundred_steps(case):
    exact = curve(case, copy.deepcopy(case.model).double(), 100)
    assert (curve(case, accelerated(copy.deepcopy(case.model).double()), 100) - exact).abs().max() <= 1e-8
    plain = (curve(case, copy.deepcopy(case.model), 100) - exact).abs().max()
    assert (curve(case, accelerated(case.model), 100) - exact).abs().max() <= 2 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(case, dtype):
    """Of a model in a narrow dtype, results are at most twice as far from float64 as before."""
    exact = case.run(copy.deepcopy(case.model).to(dtype).double(), case.images.to(dtype).double())[1]
    model = copy.deepcopy(case.model).to(dtype)
    plain, found = case.run(model)[1], case.run(accelerated(model))[1]
    assert found.dtype == plain.dtype
    assert (found - exact).norm() <= 2 * (plain - exact).norm()


def test_autocast(case):
    exact = gradients(case, copy.deepcopy(case.model).double())
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = case.run(case.model), case.run(accelerated(case.model))
        assert [value.dtype for value in found] == [value.dtype for value in expected]
        plain, found = gradients(case, case.model), gradients(case, accelerated(case.model))

    def error(got):
        return sum((got[name] - value).norm() ** 2 for name, value in exact.items()).sqrt()

    assert error(found) <= 2 * error(plain)


# ---- nothing else changes --------------------------------------------------------------------------------------------


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
    methods = {kind: dict(vars(kind)) for kind in classes.values()}
    fastmim.accelerate(case.model)
    after = build(case.family, request).model
    assert kinds(before) == kinds(after) == classes
    assert all(dict(vars(kind)) == held for kind, held in methods.items())
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


def test_explain_changes_nothing_and_tells_what_will(case):
    classes, state = kinds(case.model), torch.get_rng_state()
    told = fastmim.explain(case.model)
    assert kinds(case.model) == classes and torch.equal(torch.get_rng_state(), state)
    assert told == fastmim.accelerate(case.model) == fastmim.explain(case.model)
    assert all(what in str(told) for what in told.accelerated.values())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_accelerated_and_their_own(case, how):
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


@pytest.mark.parametrize("family", ["ViTMAEForPreTraining", "timm"])
def test_meta(family, request):
    case = build(family, request)
    moved = accelerated(case.model).to("meta")
    assert all(parameter.is_meta for parameter in moved.parameters())
    assert kinds(moved) == kinds(accelerated(case.model.to("meta")))


def test_weights_that_are_not_here_can_not_be_asked():
    with pytest.raises(UnsupportedModelError, match="weights are not here"):
        fastmim.accelerate(PlainMAE().to("meta"))


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
    """What a hook returns is what goes on."""
    for model in (case.model, twin := accelerated(case.model)):
        for path, module in model.named_modules():
            if path.endswith(("1.mlp.fc1", "1.attn.qkv", "0.attention.v_proj", "patch_embed.proj", "projection")):
                module.register_forward_hook(lambda module, args, out: 0.5 * out)
    assert torch.isclose(case.run(case.model)[0], case.run(twin)[0], rtol=1e-5)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "plain", "timm"], indirect=True)
def test_compile(case):
    model = accelerated(case.model)
    expected = case.run(case.model)
    found = case.run(torch.compile(model, backend="aot_eager"))
    assert torch.isclose(found[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "plain"], indirect=True)
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


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


CHANGES = {
    "mean squared error": dict(norm_pix_loss=False, mask_ratio=0.5),
    "eager": dict(attn_implementation="eager"),
    "no qkv bias": dict(qkv_bias=False),
    "hidden dropout of 0, 1 channel": dict(num_channels=1),
    "relu": dict(hidden_act="relu"),
    "nothing removed": dict(mask_ratio=0.0),
    "odd heads": dict(hidden_size=36, num_attention_heads=3),
}


@pytest.mark.parametrize("changes", CHANGES)
def test_configurations(changes, request):
    case = build("ViTMAEForPreTraining", request, **CHANGES[changes])
    images = case.images[:, : case.model.config.num_channels]
    expected, found = case.run(case.model, images), case.run(accelerated(case.model), images)
    assert torch.allclose(found[0], expected[0], rtol=1e-6, equal_nan=True)
    assert torch.allclose(found[1], expected[1], atol=1e-5)


def test_the_same_seed_gives_the_same_mask(hugging):
    found = []
    for model in (hugging.model, accelerated(hugging.model)):
        torch.manual_seed(3)
        found.append((model(hugging.images).mask, torch.rand(())))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_hidden_states(hugging):
    expected = hugging.model(hugging.images, noise=hugging.noise, output_hidden_states=True)
    found = accelerated(hugging.model)(hugging.images, noise=hugging.noise, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True)
    )


@pytest.mark.parametrize("by", ["argument", "config"])
def test_attention_weights_fall_back_and_say_so(by, request):
    case = build("ViTMAEForPreTraining", request, attn_implementation="eager")
    asked = dict(output_attentions=True) if by == "argument" else {}
    case.model.config.output_attentions = by == "config"
    expected = case.model(case.images, noise=case.noise, **asked)
    model = accelerated(case.model)
    with pytest.warns(UserWarning, match="output_attentions"):
        found = model(case.images, noise=case.noise, **asked)
    assert len(found.attentions) == 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found.attentions, expected.attentions, strict=True))


def test_a_hook_on_eager_attention_sees_weights(request):
    case = build("ViTMAEForPreTraining", request, attn_implementation="eager")
    fastmim.accelerate(case.model)
    seen = []
    case.model.vit.layers[0].attention.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    case.run(case.model)
    assert seen[0].shape == (3, 2, 5, 5)


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_interpolated_positions(hugging, size):
    images, noise = torch.randn(2, 3, *size), torch.rand(2, size[0] * size[1] // 64)
    expected = hugging.model(images, noise=noise, interpolate_pos_encoding=True)
    found = accelerated(hugging.model)(images, noise=noise, interpolate_pos_encoding=True)
    assert torch.isclose(found.loss, expected.loss, rtol=1e-6)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)


def test_images_get_their_gradient(hugging):
    grads = []
    for model in (hugging.model, accelerated(hugging.model)):
        images = hugging.images.clone().requires_grad_()
        model(images, noise=hugging.noise).loss.backward()
        grads.append(images.grad)
    assert torch.allclose(*grads, atol=1e-6) and grads[0].abs().sum() > 0


def test_an_attention_mask_is_theirs(hugging):
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[:, -1] = 0
    expected = hugging.model(hugging.images, noise=hugging.noise, attention_mask=mask)
    found = accelerated(hugging.model)(hugging.images, noise=hugging.noise, attention_mask=mask)
    assert torch.isclose(found.loss, expected.loss, rtol=1e-6)


@pytest.mark.parametrize(
    "images, error", [(torch.zeros(2, 3, 40, 40), "size"), (torch.zeros(2, 1, 32, 32), "channel"), (None, None)]
)
def test_errors_are_theirs(hugging, images, error):
    said = []
    for model in (hugging.model, accelerated(hugging.model)):
        with pytest.raises((ValueError, AttributeError), match=error) as raised:
            model(images)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_gradient_checkpointing(hugging):
    expected = gradients(hugging, accelerated(hugging.model).train())
    model = accelerated(hugging.model).train()
    model.gradient_checkpointing_enable()
    found = gradients(hugging, model)
    assert all(torch.allclose(found[name], value, atol=1e-7) for name, value in expected.items())
    recomputed = []
    model.vit.layers[0].attention.register_forward_hook(lambda *_: recomputed.append(1))
    gradients(hugging, model)
    assert len(recomputed) == 2


def test_save_and_load(hugging, tmp_path):
    expected = hugging.run(hugging.model)[0]
    accelerated(hugging.model).save_pretrained(tmp_path)
    again = type(accelerated(hugging.model)).from_pretrained(tmp_path)
    assert not fast(again) and again.config.architectures == ["ViTMAEForPreTraining"]
    assert torch.equal(hugging.run(again.train(hugging.model.training))[0], expected)


def test_tuples(hugging):
    found = accelerated(hugging.model)(hugging.images, noise=hugging.noise, return_dict=False)
    assert isinstance(found, tuple) and torch.isclose(found[0], hugging.run(hugging.model)[0], rtol=1e-6)


def test_another_attention_implementation_later(hugging):
    """What is chosen by hand is used, also after."""
    called = []

    def theirs(module, q, k, v, mask, **kwargs):
        called.append(module)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    transformers.AttentionInterface.register("theirs", theirs)
    fastmim.accelerate(hugging.model)
    hugging.model.set_attn_implementation("theirs")
    hugging.run(hugging.model)
    assert len(called) == 2
    assert "chosen by hand" in str(fastmim.accelerate(hugging.model))


def test_another_version_of_transformers_is_named(hugging, monkeypatch):
    monkeypatch.delattr("fastmim.interop.accelerated.huggingface", raising=False)
    monkeypatch.setitem(sys.modules, "fastmim.interop.accelerated.huggingface", None)
    with pytest.raises(UnsupportedModelError, match=f"transformers {transformers.__version__} writes it otherwise"):
        fastmim.accelerate(hugging.model)


# ---- predicting less -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["ViTMAEForPreTraining", "plain", "timm blocks"], indirect=True)
def test_only_removed_patches_are_predicted(case):
    model = case.model.double()
    fewer = accelerated(model, predict="masked")
    (loss, logits, mask, *_), (found, some, same_mask, *_) = case.run(model), case.run(fewer)
    assert torch.isclose(found, loss, rtol=1e-12) and torch.equal(mask, same_mask)
    kept = int(16 * (1 - 0.75))
    assert some.shape == (3, 16 - kept if case.family.startswith("ViT") else 12, 192)
    assert torch.allclose(some.sort(1).values, logits[mask.bool()].view_as(some).sort(1).values)
    expected, got = gradients(case, model), gradients(case, fewer)
    assert all(torch.allclose(got[name], value, atol=1e-12) for name, value in expected.items())


def test_removed_patches_come_by_rank(hugging):
    found = accelerated(hugging.model, predict="masked")(hugging.images, noise=hugging.noise)
    expected = hugging.model(hugging.images, noise=hugging.noise).logits
    ids = found.ids_restore.argsort(1)[:, 4:]
    assert torch.allclose(found.logits, fastmim.ops.gather_tokens(expected, ids), atol=1e-5)


def test_predicting_less_where_nothing_can(request):
    with pytest.raises(UnsupportedModelError, match="predict less"):
        fastmim.accelerate(build("ViTModel", request).model, predict="masked")
    with pytest.raises(ValueError, match=r"predict .*'some'"):
        fastmim.accelerate(build("ViTModel", request).model, predict="some")


# ---- what is not known stays -----------------------------------------------------------------------------------------


def check_kept(model: nn.Module, path: str, reason: str, run) -> fastmim.interop.accelerate.Report:
    """`path` keeps its class for `reason`, and the whole its results."""
    torch.manual_seed(5)
    expected = run(model)
    before = type(model.get_submodule(path))
    report = fastmim.accelerate(model)
    assert type(model.get_submodule(path)) is before and reason in report.kept[path], report
    torch.manual_seed(5)
    assert torch.isclose(run(model), expected, rtol=1e-5)
    return report


class DoubledLayer(transformers.models.vit_mae.modeling_vit_mae.ViTMAELayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return 2 * super().forward(hidden_states, attention_mask, **kwargs)


def test_an_overridden_method_stays(hugging):
    hugging.model.vit.layers[0].__class__ = DoubledLayer
    report = check_kept(hugging.model, "vit.layers.0", "overrides forward", lambda m: hugging.run(m)[0])
    assert "vit.layers.0.attention" in report.accelerated and "vit.layers.1" in report.accelerated


def test_a_replaced_method_stays(hugging):
    mlp = hugging.model.decoder.decoder_layers[1].mlp
    mlp.forward = lambda x, theirs=mlp.forward: 2 * theirs(x)
    check_kept(hugging.model, "decoder.decoder_layers.1.mlp", "on the instance", lambda m: hugging.run(m)[0])


def test_active_dropout_keeps_its_own_attention(request):
    case = build("ViTMAEForPreTraining", request, attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1)
    check_kept(case.model.train(), "vit.layers.0.attention", "dropout", lambda m: hugging_loss(case, m))
    timm = build("timm", request, attn_drop_rate=0.1, drop_path_rate=0.2)
    check_kept(timm.model.train(), "blocks.1.attn", "attn_drop of 0.1 is active", lambda m: timm.run(m)[0])
    plain = PlainMAE(block=partial(Block, attn_drop=0.1))
    check_kept(plain.train(), "blocks.1.attn", "attn_drop", lambda m: m(case.images)[0])


def hugging_loss(case: Case, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return model(case.images, noise=case.noise).loss


class Weighted(PlainMAE):
    def forward_loss(self, imgs, pred, mask):
        return super().forward_loss(imgs, pred, mask) * 2


def half_masking(self, x, mask_ratio):
    batch, length, _ = x.shape
    noise = torch.arange(length).float().expand(batch, -1)
    ids_restore = torch.argsort(torch.argsort(noise, 1), 1)
    kept = int(length * (1 - mask_ratio))
    mask = torch.ones([batch, length])
    mask[:, :kept] = 0
    return x[:, :kept], torch.gather(mask, 1, ids_restore), ids_restore


def absolute_loss(self, imgs, pred, mask):
    target = self.patchify(imgs)
    loss = (pred - target).abs().mean(-1)
    return (loss * mask).sum() / mask.sum()


def counting_loss(self, imgs, pred, mask):
    self.calls = self.calls + 1
    loss = ((pred - self.patchify(imgs)) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


def late_loss(self, imgs, pred, mask):
    loss = ((pred - self.patchify(imgs)) ** 2).mean(-1) * (1 if self.epoch < 10 else 2)
    return (loss * mask).sum() / mask.sum()


def positionless_decoder(self, x, ids_restore):
    x = self.decoder_embed(x)
    removed = self.mask_token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
    tokens = torch.cat([x[:, 1:, :], removed], dim=1)
    tokens = torch.gather(tokens, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    x = torch.cat([x[:, :1, :], tokens], dim=1)
    for block in self.decoder_blocks:
        x = block(x)
    return self.decoder_pred(self.decoder_norm(x))[:, 1:, :]


FORKS = {
    "random_masking": (half_masking, "forward_encoder: it computes something else"),
    "forward_decoder": (positionless_decoder, "forward_decoder: it computes something else"),
    "forward_loss": (absolute_loss, "forward_loss also uses abs"),
    "forward_loss that counts": (counting_loss, "also sets or imports calls"),
    "forward_loss that waits": (late_loss, "also uses epoch"),
}


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_keeps_what_it_changes(fork):
    method, reason = FORKS[fork]
    # a copy of the class with another method, not a subclass
    methods = {**vars(PlainMAE), fork.partition(" ")[0]: method, "calls": 0, "epoch": 3}
    model = type("Fork", (nn.Module,), {**methods, "__init__": nn.Module.__init__})()
    model.__dict__.update(vars(PlainMAE(norm_pix_loss=False)))
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    expected = model(images)
    calls = model.calls
    report = fastmim.accelerate(model)
    assert model.calls == calls
    assert reason in report.kept[""], report
    kept = fork.partition(" ")[0].replace("random_masking", "forward_encoder")
    assert getattr(type(model), kept) is methods[kept]
    # the rest of it is fast
    assert len(report.accelerated[""].split(";")) == 2 and "blocks.0.attn" in report.accelerated
    torch.manual_seed(1)
    found = model(images)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected))
    with pytest.raises(UnsupportedModelError):
        fastmim.accelerate(model, predict="masked")


def test_a_subclass_that_calls_its_parent():
    model = Weighted()
    report = fastmim.accelerate(model)
    assert "Weighted overrides forward_loss of PlainMAE" in report.kept[""]
    assert type(model).forward_loss is Weighted.forward_loss


class Looking(nn.Module):
    """Attention that keeps its weights to be looked at."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((self.weights @ v).transpose(1, 2).flatten(2))


class Unscaled(Looking):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


@pytest.mark.parametrize(
    "module, reason",
    [
        (Looking(16, 2), "also sets or imports weights"),
        (Unscaled(16, 2), "overrides forward"),
        (Looking(12, 2), "no kernel serves heads of width 6"),
        (Looking(16, None), "num_heads is None"),
        (Tanh(), "computes something else"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_that_do_something_else(module, reason):
    report = fastmim.explain(module)
    assert not report.accelerated and reason in report.kept[""], report
    with pytest.raises(UnsupportedModelError, match="nothing in model can be accelerated"):
        fastmim.accelerate(module)
    assert fastmim.accelerate(module, strict=False) == report


@pytest.mark.parametrize("changes, reason", [
    (dict(qk_norm=True), "q_norm besides"),
    (dict(act_layer=nn.ReLU), "activation"),
    (dict(init_values=0.1, drop_path_rate=0.1), None),
    (dict(class_token=False, global_pool="avg"), None),
    (dict(reg_tokens=2, no_embed_class=True), None),
    (dict(patch_drop_rate=0.5), None),
    (dict(dynamic_img_size=True), None),
])  # fmt: skip
def test_timm_variants(changes, reason, request):
    case = build("timm", request, **changes)
    expected = case.run(case.model.train())
    report = fastmim.accelerate(case.model)
    assert any(reason in said for said in report.kept.values()) if reason else "blocks.0.attn" in report.accelerated
    assert torch.isclose(case.run(case.model)[0], expected[0], rtol=1e-5)


def test_timm_masks_and_checkpoints(request):
    case = build("timm", request)
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    expected, causal = case.model(case.images, attn_mask=mask), case.model(case.images, is_causal=True)
    fastmim.accelerate(case.model)
    assert torch.allclose(case.model(case.images, attn_mask=mask), expected, atol=1e-5)
    assert torch.allclose(case.model(case.images, is_causal=True), causal, atol=1e-5)
    plain = gradients(case, case.model.train())
    case.model.set_grad_checkpointing()
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in gradients(case, case.model).items())


@pytest.mark.parametrize("keep", ["prefix last", "no prefix", "all"])
def test_lightly_keeps_what_it_is_told(keep, request):
    case = build("lightly", request)
    ids = {
        "prefix last": torch.tensor([[3, 5, 0]] * 3),
        "no prefix": torch.tensor([[4, 1, 2]] * 3),
        "all": None,
    }[keep]
    expected = case.model.encode(case.images, idx_keep=ids)
    assert torch.allclose(accelerated(case.model).encode(case.images, idx_keep=ids), expected, atol=1e-5)


def test_lightly_decoder(lightly_modules):
    decoder = lightly_modules.MaskedVisionTransformerDecoderTIMM(num_patches=16, embed_dim=32, depth=2, num_heads=2)
    tokens, index = torch.randn(2, 17, 32), torch.rand(2, 16).argsort(1)[:, :6] + 1
    expected = decoder(tokens, idx_mask=index)
    report = fastmim.accelerate(decoder)
    assert len(report.accelerated) == 6
    assert torch.allclose(decoder(tokens, idx_mask=index), expected, atol=1e-5)


class Abstract(ABC, PlainMAE):
    """Instances are laid out as by the first base."""


def test_a_class_that_begins_with_abc():
    model, images = Abstract(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    expected = model(images)[0]
    assert "" in fastmim.accelerate(model).accelerated
    torch.manual_seed(0)
    assert torch.isclose(model(images)[0], expected, rtol=1e-6)
    fastmim.restore(pickle.loads(pickle.dumps(model)))
    fastmim.restore(model)
    assert type(model) is Abstract


@pytest.mark.parametrize("function", [fastmim.accelerate, fastmim.restore, fastmim.explain])
def test_only_modules(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        function("facebook/vit-mae-base")


def test_a_model_inside_another(hugging):
    holder = nn.ModuleDict({"student": hugging.model, "head": nn.Linear(2, 2)})
    report = fastmim.accelerate(holder)
    assert "student.vit.layers.0" in report.accelerated and "head" in report.kept


def test_no_warning_is_given(hugging):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hugging.run(accelerated(hugging.model))
