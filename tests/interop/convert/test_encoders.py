"""Encoders found in a file by the names of their tensors, and chosen with key= where there are several."""

import pytest
import torch
from huggingface_names import respell
from small_mae import HEADS, build, encoder_of, same_bits, weights_of
from torch.optim.swa_utils import AveragedModel

from fastmim import load

pytestmark = pytest.mark.fault


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in weights.items()}


ENVELOPES = {
    "DeepSpeed": lambda weights: {"module": weights, "optimizer": None, "buffer_names": [], "global_steps": 3},
    "nested": lambda weights: {"model": {"state_dict": weights}, "epoch": 1},
    "nested and wrapped": lambda weights: {"app": {"model": prefixed("net.module.", weights)}},
    "an optimizer by name": lambda weights: {
        "model": weights, "optimizer": {"state": {name: {"exp_avg": v} for name, v in weights.items()}},
    },
    "Lightning": lambda weights: {
        "state_dict": prefixed("model.", weights), "hyper_parameters": {"lr": 0.1}, "loops": {"fit_loop": {}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
    },
    "one mapping, two names": lambda weights: {"model": weights, "state_dict": weights},
    "tensors beside": lambda weights: {"model": weights, "epoch": torch.tensor(3)},
    "averaged": lambda weights: {"ema": prefixed("backbone.", weights)},
}  # fmt: skip
SPELLINGS = {
    "facebook": lambda weights: weights,
    "huggingface": lambda weights: respell(weights, "5"),
    "lightly": lambda weights: {
        name.replace("decoder_embed", "decoder.decoder_embed") if name.startswith("decoder_embed")
        else "prediction_head" + name.removeprefix("decoder_pred") if name.startswith("decoder_pred")
        else "decoder." + name.removeprefix("decoder_") if name.startswith(("decoder_", "mask_token"))
        else f"backbone.vit.{name}": value
        for name, value in weights.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("envelope", ENVELOPES)
def test_the_encoder_is_found_by_its_names(file, envelope, spelling):
    weights = weights_of(build())
    torch.save(ENVELOPES[envelope](SPELLINGS[spelling](weights)), file)
    assert same_bits(load(file, **HEADS), weights)


@pytest.mark.parametrize("prefix", ["net.", "encoder.", "backbone.", "model.backbone.", "module.net._orig_mod."])
def test_any_prefix_is_removed_and_other_names_stay(file, prefix):
    weights = weights_of(build())
    beside = {"criterion.weight": torch.ones(3), "epoch": 3}
    torch.save({"state_dict": prefixed(prefix, {**weights, "head.bias": torch.ones(1)}) | beside}, file)
    with pytest.raises(ValueError, match=r"missing \[\], left over \['head\.bias', 'criterion\.weight', 'epoch'\]"):
        load(file, **HEADS)
    assert same_bits(load(file, **HEADS, allow_leftover=["criterion.*", "epoch", "head.*"]), weights)


def test_a_decoder_without_the_encoders_prefix_is_left_over(file):
    model = build()
    decoder = {name: value for name, value in weights_of(model).items() if name not in encoder_of(model)}
    torch.save(prefixed("encoder.", encoder_of(model)) | decoder, file)
    with pytest.raises(ValueError, match=r"for an encoder alone.* left over \['decoder_blocks\.0"):
        load(file, **HEADS, decoder_depth=1)


def test_a_value_among_the_weights_is_left_where_that_is_allowed(file):
    weights = weights_of(build())
    torch.save({**weights, "epoch": 3, "module._extra_state": None}, file)
    with pytest.raises(ValueError, match=r"must map names to tensors; 'epoch' is of type int$"):
        load(file, **HEADS, allow_leftover="_extra*")
    assert same_bits(load(file, **HEADS, allow_leftover=["_extra*", "epoch"]), weights)


def test_an_averaged_model_of_torch(file):
    model = build()
    torch.save(AveragedModel(model).state_dict(), file)
    with pytest.raises(ValueError, match=r"left over \['n_averaged'\]"):
        load(file, **HEADS)
    assert same_bits(load(file, **HEADS, allow_leftover="n_averaged"), weights_of(model))


def test_new_weights_have_the_dtype_of_the_encoder(file):
    weights = {"n_averaged": torch.tensor(1), **encoder_of(build())}
    torch.save(weights, file)
    model = load(file, **HEADS, decoder_depth=1, allow_missing="decoder", allow_leftover="n_averaged")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


A, B = {"embed_dim": 32}, {"embed_dim": 64}


def two(form: str) -> dict:
    a, b = weights_of(build(**A)), weights_of(build(**B))
    return {
        "envelopes": {"teacher": a, "student": b, "epoch": 1},
        "prefixes": {"state_dict": prefixed("teacher.", a) | prefixed("student.", b) | {"center": torch.ones(3)}},
        "heads beside": {
            "teacher": prefixed("backbone.", a) | {"head.bias": torch.ones(1)}, "student": prefixed("backbone.", b),
        },
        "wrapped": prefixed("module.teacher.", a) | prefixed("module.student.module.", b),
        "spellings": {"teacher": a, "student": respell(b, "4")},
    }[form]  # fmt: skip


NAMES = {
    "envelopes": ["teacher", "student"],
    "prefixes": ["state_dict.teacher", "state_dict.student"],
    "heads beside": ["teacher.backbone", "student.backbone"],
    "wrapped": ["teacher", "student"],
    "spellings": ["teacher", "student"],
}


@pytest.mark.parametrize("form", NAMES)
def test_two_encoders_need_a_key(file, form):
    torch.save(two(form), file)
    with pytest.raises(ValueError) as caught:
        load(file, **HEADS)
    assert f"{file} has 2 encoders: choose one by its key, of {NAMES[form]}" in str(caught.value)
    for key, changes in zip(NAMES[form], (A, B)):
        assert same_bits(load(file, **HEADS, key=key), weights_of(build(**changes)))
    with pytest.raises(ValueError) as caught:
        load(file, **HEADS, key="optimizer")
    assert f"{file} has no encoder under key='optimizer': key must be one of {NAMES[form]}" in str(caught.value)


def test_a_key_may_contain_more_than_the_encoder(file):
    """Names under the key that are left over are refused."""
    torch.save(two("heads beside"), file)
    with pytest.raises(ValueError, match=r"missing \[\], left over \['head\.bias'\]"):
        load(file, **HEADS, key="teacher")
    expected = weights_of(build(**A))
    assert same_bits(load(file, **HEADS, key="teacher", allow_leftover="head.*"), expected)
    torch.save({"run": two("envelopes")}, file)
    with pytest.raises(ValueError, match=r"2 encoders under key='run': choose one by its key, of \['run\.teacher'"):
        load(file, **HEADS, key="run")


def test_a_key_as_the_file_wraps_its_names(file):
    torch.save({"module": weights_of(build(**A)), "ema": prefixed("module.", weights_of(build(**B)))}, file)
    for key, changes in (("module", A), ("ema", B), ("ema.module", B)):
        assert same_bits(load(file, **HEADS, key=key), weights_of(build(**changes)))


def test_the_bare_names_are_the_empty_key(file):
    weights = weights_of(build(**A))
    torch.save(weights | prefixed("ema.", weights_of(build(**B))), file)
    with pytest.raises(ValueError, match=r"of \['', 'ema'\]"):
        load(file, **HEADS)
    assert same_bits(load(file, **HEADS, key="", allow_leftover="ema.*"), weights)
    assert same_bits(load(file, **HEADS, key="ema"), weights_of(build(**B)))


def test_a_key_of_the_file_may_be_a_number(file):
    """Averaged weights by their decay."""
    torch.save({"model": weights_of(build(**A)), "ema": {0.999: weights_of(build(**B))}}, file)
    with pytest.raises(ValueError, match=r"of \['model', 'ema\.0\.999'\]"):
        load(file, **HEADS)
    assert same_bits(load(file, **HEADS, key="ema"), weights_of(build(**B)))


@pytest.mark.parametrize("key", [3, ["teacher"], b"teacher"])
def test_a_key_is_a_name(file, key):
    torch.save(two("envelopes"), file)
    with pytest.raises(TypeError, match="key must be the name of a part of the file"):
        load(file, **HEADS, key=key)


def test_a_content_that_contains_itself(file):
    held = {"model": weights_of(build())}
    held["self"] = held
    torch.save(held, file)
    assert same_bits(load(file, **HEADS), weights_of(build()))
