"""Modules and methods that accelerate() keeps, because it does not know exactly what they do."""

import pickle
import warnings
from abc import ABC
from functools import partial

import pytest
import torch
from accelerated_cases import Case, accelerated, build, gradients
from forked_mae import Block, ForkedMAE
from torch import Tensor, nn

import fastmim
from fastmim.interop.accelerate.api import UnsupportedModelError

transformers = pytest.importorskip("transformers")


def check_kept(model: nn.Module, path: str, reason: str, run) -> fastmim.interop.accelerate.api.Report:
    """Check that the module at `path` keeps its class for `reason`, and that the model's results stay equal."""
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
    plain = ForkedMAE(block=partial(Block, attn_drop=0.1))
    check_kept(plain.train(), "blocks.1.attn", "attn_drop", lambda m: m(case.images)[0])


def hugging_loss(case: Case, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return model(case.images, noise=case.noise).loss


class Weighted(ForkedMAE):
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
    methods = {**vars(ForkedMAE), fork.partition(" ")[0]: method, "calls": 0, "epoch": 3}
    model = type("Fork", (nn.Module,), {**methods, "__init__": nn.Module.__init__})()
    model.__dict__.update(vars(ForkedMAE(norm_pix_loss=False)))
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    expected = model(images)
    calls = model.calls
    report = fastmim.accelerate(model)
    assert model.calls == calls
    assert reason in report.kept[""], report
    kept = fork.partition(" ")[0].replace("random_masking", "forward_encoder")
    assert getattr(type(model), kept) is methods[kept]
    # the rest is accelerated
    assert len(report.accelerated[""].split(";")) == 2 and "blocks.0.attn" in report.accelerated
    torch.manual_seed(1)
    found = model(images)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected))
    with pytest.raises(UnsupportedModelError):
        fastmim.accelerate(model, predict="masked")


def masking_by_noise(self, x, mask_ratio, noise=None):
    batch, length, dim = x.shape
    kept = int(length * (1 - mask_ratio))
    if noise is None:
        noise = torch.rand(batch, length, device=x.device)
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    visible = torch.gather(x, 1, ids_shuffle[:, :kept].unsqueeze(-1).repeat(1, 1, dim))
    mask = torch.ones([batch, length], device=x.device)
    mask[:, :kept] = 0
    return visible, torch.gather(mask, 1, ids_restore), ids_restore


def encoder_with_noise(self, x, mask_ratio, noise=None):
    x = self.patch_embed(x) + self.pos_embed[:, 1:, :]
    x, mask, ids_restore = self.random_masking(x, mask_ratio, noise)
    cls_token = self.cls_token + self.pos_embed[:, :1, :]
    x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)
    for block in self.blocks:
        x = block(x)
    return self.norm(x), mask, ids_restore


def forward_with_noise(self, imgs, mask_ratio=0.75, noise=None):
    latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
    pred = self.forward_decoder(latent, ids_restore)
    return self.forward_loss(imgs, pred, mask), pred, mask


def test_a_fork_that_takes_noise():
    methods = dict(
        random_masking=masking_by_noise, forward_encoder=encoder_with_noise, forward=forward_with_noise,
        __init__=nn.Module.__init__,
    )  # fmt: skip
    model = type("Fork", (nn.Module,), {**vars(ForkedMAE), **methods})()
    model.__dict__.update(vars(ForkedMAE()))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    loss, pred, mask = model(images, 0.6, noise)
    report = fastmim.accelerate(model, predict="masked")
    assert len(report.accelerated[""].split(";")) == 4 and "" not in report.kept, report
    found, some, same_mask = model(images, 0.6, noise=noise)
    assert torch.isclose(found, loss, rtol=1e-5) and torch.equal(same_mask, mask)
    removed = noise.argsort(1)[:, 6:]
    assert torch.allclose(some, fastmim.ops.gather_tokens(pred, removed), atol=1e-5)


def test_a_subclass_that_calls_its_parent():
    model = Weighted()
    report = fastmim.accelerate(model)
    assert "Weighted overrides forward_loss of ForkedMAE" in report.kept[""]
    assert type(model).forward_loss is Weighted.forward_loss


class Looking(nn.Module):
    """Attention that stores its weights."""

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
        (Looking(16, None), "its num_heads is None"),
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
    (dict(qk_norm=True), "also has q_norm"),
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
    assert any(reason in text for text in report.kept.values()) if reason else "blocks.0.attn" in report.accelerated
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
def test_ids_that_lightly_keeps(keep, request):
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


class Abstract(ABC, ForkedMAE):
    """Class whose first base, ABC, decides the layout of instances."""


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
