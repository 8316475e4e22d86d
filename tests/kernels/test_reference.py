"""The reference against formulas written out by hand, in float64.

Nothing here is shared with `fastmim.reference`: loops where it indexes, whole images where it cuts, PyTorch's own
functions where it spells arithmetic out. Gradients are those that autograd takes through the hand-written formula.
"""

import math

import pytest
import torch
from cases import draw_ids, draw_images, lay, randn
from torch.nn import functional as F

from fastmim import reference

close = dict(rtol=1e-11, atol=1e-12)
WORD = 2**32


def check(found, expected):
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **close)


def gradients(formula, *leaves):
    """Return the formula's value, a random gradient for it, and those of the leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = formula(*leaves)
    grad = randn(value.shape)
    return value.detach(), grad, torch.autograd.grad(value, leaves, grad)


# ---- masking ---------------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Compute Philox4x32-10 on Python's integers: Salmon et al., SC 2011, figure 4."""
    for _ in range(10):
        (high0, low0), (high2, low2) = divmod(0xD2511F53 * counter[0], WORD), divmod(0xCD9E8D57 * counter[2], WORD)
        counter = [high2 ^ counter[1] ^ key[0], low2, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_of_random123(counter, key, words):
    """Compare with the results that its authors publish."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox(counter, key) == words


@pytest.mark.parametrize("count", [1, 4, 7, 257])
def test_philox(count):
    seeds = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), 0x299F31D0A4093822]
    expected = [
        [philox([j // 4, 0, 0, 0], [seed % WORD, (seed >> 32) % WORD])[j % 4] for j in range(count)] for seed in seeds
    ]
    assert reference.philox(torch.tensor(seeds), count).tolist() == expected


def test_philox_known_answer():
    assert [f"{word:08x}" for word in reference.philox(torch.tensor([0]), 4)[0].tolist()] == (
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8".split()
    )


@pytest.mark.parametrize("len_keep, len_predict", [(1, 48), (12, 37), (12, 5), (49, 0)])
def test_random_masking(len_keep, len_predict):
    """For distinct noise the two argsorts of facebookresearch/mae; a rank is a count of smaller noises."""
    noise = torch.rand(5, 49, dtype=torch.float64)
    ids_keep, ids_predict, ids_restore = reference.random_masking(5, 49, len_keep, len_predict, noise, None)
    ids_shuffle = torch.argsort(noise, dim=1)
    assert torch.equal(ids_restore, torch.argsort(ids_shuffle, dim=1))
    assert torch.equal(ids_keep, ids_shuffle[:, :len_keep])
    assert torch.equal(ids_predict, ids_shuffle[:, len_keep:][:, :len_predict])
    assert torch.equal(ids_restore, (noise[:, None] < noise[:, :, None]).sum(-1))


def test_random_masking_of_equal_noise():
    """Ties go by index."""
    noise = torch.randint(0, 4, (5, 49)).double()
    _, _, ids_restore = reference.random_masking(5, 49, 9, 40, noise, None)
    for row, ranks in zip(noise.tolist(), ids_restore.tolist()):
        order = sorted(range(49), key=lambda j: (row[j], j))
        assert [order[rank] for rank in ranks] == list(range(49))


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_gather_tokens():
    tokens, ids = randn(3, 7, 5), draw_ids(3, 7, 4)

    def formula(tokens):
        return torch.stack([torch.stack([tokens[b, ids[b, k]] for k in range(4)]) for b in range(3)])

    value, grad, (dtokens,) = gradients(formula, tokens)
    assert torch.equal(reference.gather_tokens(tokens, ids), value)
    assert torch.equal(reference.gather_tokens_backward(grad, ids, 7), dtokens)
    # one table for all samples
    assert torch.equal(reference.gather_tokens(tokens[0], ids), formula(tokens[:1].expand(3, -1, -1)))


def test_sum_by_position():
    rows, ids = randn(3, 4, 5), draw_ids(3, 7, 4)
    expected = torch.zeros(7, 5, dtype=torch.float64)
    for b in range(3):
        for k in range(4):
            expected[ids[b, k]] += rows[b, k]
    check(reference.sum_by_position(rows, ids, 7), expected)


def test_sum_rows():
    x = randn(3, 4, 5)
    check(reference.sum_rows(x), sum(row for rows in x for row in rows))


@pytest.mark.parametrize("own_token", [False, True])
@pytest.mark.parametrize("own_pos", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_decoder_tokens(prefix, own_pos, own_token):
    """VideoMAE V2: visible tokens and mask tokens, each plus its position; the prefix rows come first.

    The mask token and the positions may be of each sample.
    """
    visible, mask_token, pos = randn(2, prefix + 4, 5), randn(2, 5), randn(2, prefix + 7, 5)
    mask_token[1] = mask_token[1] if own_token else mask_token[0]
    pos[1] = pos[1] if own_pos else pos[0]
    ids_keep, ids_predict = draw_ids(2, 7, 4), draw_ids(2, 7, 3)
    expected = [
        [
            *(visible[b, n] + pos[b, n] for n in range(prefix)),
            *(visible[b, prefix + k] + pos[b, prefix + ids_keep[b, k]] for k in range(4)),
            *(mask_token[b] + pos[b, prefix + ids_predict[b, m]] for m in range(3)),
        ]
        for b in range(2)
    ]
    given = mask_token if own_token else mask_token[0], pos if own_pos else pos[0]
    found = reference.decoder_tokens(visible, ids_keep, ids_predict, *given, prefix)
    check(found, torch.stack([torch.stack(row) for row in expected]))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("len_keep", [1, 4, 7])
def test_unshuffle(prefix, len_keep):
    """facebookresearch/mae's decoder: append mask tokens, gather by ids_restore, add positions."""
    visible, mask_token, pos = randn(2, prefix + len_keep, 5), randn(5), randn(prefix + 7, 5)
    ids_restore = draw_ids(2, 7, "all")

    def formula(visible, mask_token):
        mask_tokens = mask_token.repeat(2, 7 - len_keep, 1)
        patches = torch.cat([visible[:, prefix:], mask_tokens], dim=1)
        patches = torch.gather(patches, 1, ids_restore.unsqueeze(-1).repeat(1, 1, 5))
        return torch.cat([visible[:, :prefix], patches], dim=1) + pos

    value, grad, (dvisible, dmask) = gradients(formula, visible, mask_token)
    check(reference.unshuffle(visible, ids_restore, mask_token, pos, prefix), value)
    found = reference.unshuffle_backward(grad, ids_restore, len_keep, prefix)
    check(found[0], dvisible)
    check(found[1], dmask)


# ---- patches ---------------------------------------------------------------------------------------------------------

PICTURES = [((6, 9), (2, 3)), ((4, 4), (4, 4)), ((5, 7), (1, 1)), ((4, 6, 9), (2, 2, 3)), ((3, 2, 2), (1, 2, 1))]
PICTURES += [((12,), (3,)), ((4,), (1,))]
INTEGERS = {torch.uint8: 255, torch.uint16: 65535}
MEAN, STD = torch.tensor([0.5, -0.25, 0.125]).double(), torch.tensor([0.5, 2.0, 0.3]).double()


def slices(sizes, patch):
    """Return the slices of each patch, in row-major order of the grid."""
    corners = [()]
    for size, p in zip(sizes, patch):
        corners = [(*corner, start) for corner in corners for start in range(0, size, p)]
    return [tuple(slice(start, start + p) for start, p in zip(corner, patch)) for corner in corners]


def normalized(images, mean, std):
    """Normalise images as torchvision's ToTensor and Normalize do."""
    pixels = images.double() / INTEGERS.get(images.dtype, 1)
    per_channel = (3, *[1] * (images.dim() - 2))
    pixels = pixels if mean is None else pixels - mean.view(per_channel)
    return pixels if std is None else pixels / std.view(per_channel)


@pytest.mark.parametrize("mean, std", [(None, None), (MEAN, STD), (MEAN, None), (None, STD)])
@pytest.mark.parametrize("pixels", ["uint8", "uint16", "float"])
@pytest.mark.parametrize("sizes, patch", PICTURES)
def test_gather_patches(sizes, patch, pixels, mean, std):
    images, where = draw_images(2, 3, sizes, pixels), slices(sizes, patch)
    ids = draw_ids(2, len(where), max(1, len(where) // 2))

    def formula(images):
        whole = normalized(images, mean, std)
        rows = [[whole[b][(slice(None), *where[i])].flatten() for i in ids[b]] for b in range(2)]
        return torch.stack([torch.stack(row) for row in rows])

    found = reference.gather_patches(images, ids, list(patch), mean, std, torch.float64)
    if pixels != "float":
        check(found, formula(images))
        return
    value, grad, (dimages,) = gradients(formula, images)
    check(found, value)
    backward = reference.gather_patches_backward(grad, ids, list(patch), std, list(images.shape), torch.float64)
    check(backward, dimages)


@pytest.mark.parametrize("pixels", ["uint8", "uint16", "float"])
@pytest.mark.parametrize("sizes, patch", PICTURES)
def test_embed_patches(sizes, patch, pixels):
    """The result is the convolution over the whole image, plus position, then the chosen tokens."""
    images, length = draw_images(2, 3, sizes, pixels), len(slices(sizes, patch))
    ids = draw_ids(2, length, max(1, length // 2))
    weight, bias, pos, prefix = randn(5, 3, *patch), randn(5), randn(length, 5), randn(2, 5)
    convolve = [F.conv1d, F.conv2d, F.conv3d][len(patch) - 1]
    tokens = convolve(normalized(images, MEAN, STD), weight, bias, stride=patch).flatten(2).transpose(1, 2) + pos
    expected = torch.stack([torch.cat([prefix, tokens[b, ids[b]]]) for b in range(2)])
    check(reference.embed_patches(images, ids, weight, bias, pos, prefix, MEAN, STD, torch.float64), expected)


# ---- attention -------------------------------------------------------------------------------------------------------


def sdpa(q, k, v, key_mask=None, bias=None, scale=None):
    """Compute PyTorch's attention, with the mask and the bias as one additive table."""
    table = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=q.dtype)
    table = table if bias is None else table + bias
    table = table if key_mask is None else table.masked_fill(~key_mask[:, None, None], -math.inf)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), table, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("queries, keys", [(5, 5), (1, 7), (17, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [(), (2, 1, 1), (3, 2, "queries", "keys"), ("keys",)])
def test_attention(queries, keys, masked, biased):
    q, k, v = randn(3, queries, 2, 7), randn(3, keys, 2, 7), randn(3, keys, 2, 7)
    key_mask = torch.rand(3, keys) < 0.6 if masked else None
    if masked:
        key_mask[:, 0] = True  # SDPA has no answer for a query without keys
    bias = randn([dict(queries=queries, keys=keys).get(size, size) for size in biased])
    value, grad, expected = gradients(lambda *x: sdpa(*x[:3], key_mask, x[3], 0.4), q, k, v, bias)
    check(reference.attention(q, k, v, key_mask, bias, 0.4), value)
    for found, gradient in zip(reference.attention_backward(grad, q, k, v, key_mask, bias, 0.4, True), expected):
        check(found, gradient)


def test_attention_by_hand():
    q, k, v, scale = randn(2, 3, 2, 5), randn(2, 4, 2, 5), randn(2, 4, 2, 5), 5**-0.5
    key_mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    found = reference.attention(q, k, v, key_mask, None, scale)
    for h in range(2):
        for i in range(3):
            seen = [j for j in range(4) if key_mask[0, j]]
            scores = [math.exp(scale * float(q[0, i, h] @ k[0, j, h])) for j in seen]
            check(found[0, i, h], sum(score * v[0, j, h] for score, j in zip(scores, seen)) / sum(scores))
    assert (found[1] == 0).all()


def test_attention_qkvpacked():
    qkv, key_mask = randn(3, 5, 3, 2, 7), torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 4 + [True]])
    value, grad, (expected,) = gradients(lambda qkv: sdpa(*qkv.unbind(2), key_mask, scale=0.4), qkv)
    check(reference.attention_qkvpacked(qkv, key_mask, 0.4), value)
    dqkv, sums = reference.attention_qkvpacked_backward(grad, qkv, key_mask, 0.4, True)
    check(dqkv, expected)
    check(sums, expected.sum((0, 1)))
    _, grad, (expected,) = gradients(lambda qkv: sdpa(*qkv.unbind(2), key_mask, scale=0.4)[:, 2:], qkv)
    check(reference.attention_qkvpacked_backward(grad, qkv, key_mask, 0.4, False)[0], expected)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("queries, keys", [((3, 1, 4), (3, 1, 4)), ((2, 0, 5), (1, 6, 2)), ((4,), (2,))])
def test_attention_varlen(queries, keys, spare):
    q, k, v = randn(sum(queries), 2, 7), randn(sum(keys), 2, 7), randn(sum(keys), 2, 7)
    cu_q, cu_k = (torch.tensor([sum(sizes[:i]) for i in range(len(sizes) + 1)]) for sizes in (queries, keys))

    def formula(*x):
        parts = zip(x[0].split(queries), x[1].split(keys), x[2].split(keys))
        return torch.cat([sdpa(*(part[None] for part in row), scale=0.4)[0] for row in parts])

    value, grad, expected = gradients(formula, q, k, v)
    sizes = cu_q, cu_k, max(queries) + spare, max(keys) + spare, 0.4
    check(reference.attention_varlen(q, k, v, *sizes), value)
    for found, gradient in zip(reference.attention_varlen_backward(grad, q, k, v, *sizes), expected):
        check(found, gradient)


# ---- loss ------------------------------------------------------------------------------------------------------------


def mae_target(images, p, norm_pix_loss):
    """Compute facebookresearch/mae's target: values in order (p, q, c), one unbiased variance, eps inside the root."""
    n, c, height, width = images.shape
    h, w = height // p, width // p
    target = torch.einsum("nchpwq->nhwpqc", images.reshape(n, c, h, p, w, p)).reshape(n, h * w, p * p * c)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    return target


def videomae_target(videos, patch):
    """Compute MCG-NJU/VideoMAE's target: cubes "(p0 p1 p2) c", variance per channel, eps added to the deviation."""
    n, c, *sizes = videos.shape
    (t, h, w), (p0, p1, p2) = (size // p for size, p in zip(sizes, patch)), patch
    cubes = videos.reshape(n, c, t, p0, h, p1, w, p2).permute(0, 2, 4, 6, 3, 5, 7, 1)
    cubes = cubes.reshape(n, t * h * w, p0 * p1 * p2, c)
    cubes = (cubes - cubes.mean(-2, keepdim=True)) / (cubes.var(-2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    return cubes.flatten(2)


def error_loss(error, loss):
    """Compute the formulas of MSELoss, L1Loss and HuberLoss with delta 1, from torch's documentation."""
    size = error.abs()
    return {"squared": error**2, "absolute": size, "huber": torch.where(size < 1, 0.5 * error**2, size - 0.5)}[loss]


LOSSES = dict(squared=reference.LOSS_SQUARED, absolute=reference.LOSS_ABSOLUTE, huber=reference.LOSS_HUBER)


def check_pixel_loss(target, images, patch, norm, mean=None, std=None, loss="squared"):
    """Compare with MAE's loss over all patches and a mask, and with weights that depend on the patch."""
    batch, length, values = target.shape
    pred, ids = randn(*target.shape), draw_ids(batch, length, max(1, length // 2))
    mask = torch.zeros(batch, length, dtype=torch.float64).scatter(1, ids, 1)
    weight = torch.rand(batch, length, dtype=torch.float64)
    each = ids[..., None].expand(-1, -1, values)
    chosen = torch.gather(pred, 1, each)
    for w in (None, weight):
        rows = mask if w is None else mask * w
        given = None if w is None else w.gather(1, ids)
        for reduction in (reference.REDUCE_NONE, reference.REDUCE_MEAN, reference.REDUCE_SUM):
            leaf = pred.clone().requires_grad_()
            losses = error_loss(leaf - target, loss).mean(-1) * rows
            total = losses.sum() / (rows.sum() if reduction == reference.REDUCE_MEAN else 1)
            (gradient,) = torch.autograd.grad(total, leaf)
            expected = losses.gather(1, ids) if reduction == reference.REDUCE_NONE else total
            arguments = chosen, images, ids, list(patch), norm, given, mean, std, LOSSES[loss], reduction
            found, grad = reference.pixel_loss(*arguments, True)
            check(found, expected.detach())
            check(grad, torch.gather(gradient, 1, each))
            alone, nothing = reference.pixel_loss(*arguments, False)
            assert torch.equal(alone, found) and nothing.numel() == 0


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("pixels", ["uint8", "uint16", "float"])
@pytest.mark.parametrize("size, p", [((6, 9), 3), ((8, 4), 4), ((2, 6), 2)])
def test_pixel_loss_of_mae(size, p, pixels, norm_pix):
    images = draw_images(2, 3, size, pixels)
    target = mae_target(normalized(images, MEAN, STD), p, norm_pix)
    check_pixel_loss(target, images, (p, p), reference.NORM_PATCH if norm_pix else reference.NORM_NONE, MEAN, STD)


@pytest.mark.parametrize("loss", ["absolute", "huber"])
def test_pixel_loss_of_other_errors(loss):
    images = draw_images(2, 3, (6, 9), "uint8")
    target = mae_target(normalized(images, MEAN, STD), 3, False)
    check_pixel_loss(target, images, (3, 3), reference.NORM_NONE, MEAN, STD, loss)


@pytest.mark.parametrize("sizes, patch", [((4, 6, 9), (2, 2, 3)), ((2, 4, 4), (2, 4, 4)), ((1, 4, 6), (1, 2, 2))])
def test_pixel_loss_of_videomae(sizes, patch):
    videos = draw_images(2, 3, sizes, "float")
    check_pixel_loss(videomae_target(videos, patch), videos, patch, reference.NORM_CHANNEL)


@pytest.mark.parametrize("gamma", [1, 1.5, 2, 3])
@pytest.mark.parametrize("reduction", [reference.REDUCE_NONE, reference.REDUCE_MEAN, reference.REDUCE_SUM])
@pytest.mark.parametrize("weighted", [False, True])
def test_scaled_cosine_loss(gamma, reduction, weighted):
    """GraphMAE's sce_loss; a weight repeats a row."""
    pred, target = randn(3, 4, 5), randn(3, 4, 5)
    weight = torch.rand(3, 4, dtype=torch.float64) if weighted else None

    def formula(pred, target):
        x, y = F.normalize(pred, p=2, dim=-1), F.normalize(target, p=2, dim=-1)
        loss = (1 - (x * y).sum(dim=-1)).pow(gamma)
        rows = torch.ones(3, 4, dtype=torch.float64) if weight is None else weight
        weighed = {0: loss * rows, 1: (loss * rows).sum() / rows.sum(), 2: (loss * rows).sum()}
        return weighed[reduction]

    leaves = [x.requires_grad_() for x in (pred, target)]
    expected = formula(*leaves)
    gradient = torch.autograd.grad(expected.sum(), leaves)
    loss, *found = reference.scaled_cosine_loss(pred.detach(), target.detach(), gamma, weight, reduction, True, True)
    check(loss, expected.detach())
    check(found[0], gradient[0])
    check(found[1], gradient[1])


# ---- norm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (4, 1)])
def test_add_layer_norm(shape):
    x, residual, weight, bias, x_bias = randn(*shape), randn(*shape), *randn(3, shape[-1])
    total = residual + (x + x_bias)

    def formula(total, weight, bias):
        return F.layer_norm(total, shape[-1:], weight, bias, eps=1e-3)

    value, grad, expected = gradients(formula, total, weight, bias)
    normed, found, mean, rstd = reference.add_layer_norm(x, residual, weight, bias, 1e-3, None, x_bias)
    check(normed, value)
    check(found, total)
    grad_sum, rows = randn(*shape), (-1, shape[-1])
    dtotal, dweight, dbias, recomputed, dx, dx_bias = reference.add_layer_norm_backward(
        grad, grad_sum, total, mean, rstd, weight, bias, torch.float32, True
    )
    check(recomputed, normed)
    check(dtotal, expected[0] + grad_sum)
    check(dweight, expected[1])
    check(dbias, expected[2])
    assert torch.equal(dx, dtotal.float())
    check(dx_bias, dtotal.reshape(rows).sum(0))
    if len(shape) > 1:
        last = reference.add_layer_norm_backward(grad, grad_sum[..., 2:, :], total, mean, rstd, weight)[0]
        check(last[..., :2, :], expected[0][..., :2, :])
        assert torch.equal(last[..., 2:, :], dtotal[..., 2:, :])
    alone, nothing, *_ = reference.add_layer_norm(None, total, weight, bias, 1e-3)
    assert torch.equal(alone, normed) and nothing.numel() == 0
    dtotal, *_, recomputed, dx, dx_bias = reference.add_layer_norm_backward(grad, None, total, mean, rstd, weight)
    check(dtotal, expected[0])
    assert recomputed.numel() == dx.numel() == dx_bias.numel() == 0


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_bias_gelu(shape):
    x, bias = 3 * randn(*shape), randn(shape[-1])

    def formula(x, bias):
        return (x + bias) * 0.5 * (1 + torch.erf((x + bias) / 2**0.5))

    value, grad, expected = gradients(formula, x, bias)
    check(reference.bias_gelu(x, bias), value)
    *found, recomputed = reference.bias_gelu_backward(grad, x, bias, True)
    for ours, gradient in zip(found, expected):
        check(ours, gradient)
    check(recomputed, value)


# ---- storage, and ids that were not checked --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_in_float32(dtype):
    """16-bit storage rounds the result alone."""
    tokens, ids, row, table = randn(2, 7, 5), draw_ids(2, 7, 4), randn(5), randn(7, 5)
    q, k, v = randn(2, 5, 3, 8), randn(2, 6, 3, 8), randn(2, 6, 3, 8)
    images, patches = randn(2, 3, 4, 14), randn(2, 4, 12)
    calls = {
        "decoder_tokens": lambda x: reference.decoder_tokens(x(tokens[:, :4]), ids, ids, x(row), x(table), 0),
        "unshuffle": lambda x: reference.unshuffle(x(tokens[:, :4]), draw_ids(2, 7, "all"), x(row), x(table), 0),
        "gather_patches": lambda x: reference.gather_patches(x(images), ids, [2, 2], MEAN, STD, x(row).dtype),
        "attention": lambda x: reference.attention(x(q), x(k), x(v), None, None, 0.3),
        "attention_backward": lambda x: reference.attention_backward(x(q), x(q), x(k), x(v), None, None, 0.3, False)[1],
        "pixel_loss": lambda x: reference.pixel_loss(
            x(patches), x(images), ids, [2, 2], 1, None, MEAN, STD, 0, 1, False
        )[0],
        "scaled_cosine_loss": lambda x: reference.scaled_cosine_loss(x(k), x(v), 2.0, None, 0, False, False)[0],
        "add_layer_norm": lambda x: reference.add_layer_norm(x(tokens), 0 * x(tokens), x(row), x(row), 1e-6)[0],
        "bias_gelu": lambda x: reference.bias_gelu(x(tokens), x(row)),
    }
    for name, call in calls.items():
        torch.manual_seed(0)
        narrow = call(lambda x: x.to(dtype))
        torch.manual_seed(0)
        upcast = call(lambda x: x.to(dtype).float())
        assert torch.equal(narrow, upcast.to(narrow.dtype)), name


@pytest.mark.parametrize("bad", [7, -1, -100, 2**40])
def test_unchecked_ids_read_nan_and_write_nothing(monkeypatch, bad):
    """Ids are not checked here, as on a GPU, where a check would wait for the device."""
    monkeypatch.setattr("fastmim.reference.indexing.can_check", lambda x: False)
    ids = draw_ids(2, 7, 4)
    ids[1, 2] = bad
    tokens, row, table, images = randn(2, 7, 5), randn(5), randn(7, 5), randn(2, 3, 2, 14)

    def only_that_row_is_nan(rows):
        nan = rows.isnan()
        assert nan[1, 2].all() and nan.sum() == nan[1, 2].numel()

    only_that_row_is_nan(reference.gather_tokens(tokens, ids))
    only_that_row_is_nan(reference.decoder_tokens(tokens[:, :4], ids, ids[:, :0], row, table, 0))
    only_that_row_is_nan(reference.gather_patches(images, ids, [2, 2], MEAN, STD, torch.float64))
    only_that_row_is_nan(reference.embed_patches(images, ids, randn(5, 3, 2, 2), *[None] * 5, torch.float64))
    loss, grad = reference.pixel_loss(randn(2, 4, 12), images, ids, [2, 2], 1, None, None, None, 0, 1, True)
    only_that_row_is_nan(grad)
    assert loss.isnan()
    ranks = draw_ids(2, 7, "all")
    ranks[1, 2] = bad
    only_that_row_is_nan(reference.unshuffle(tokens[:, :4], ranks, row, table, 0))

    good = torch.ones(2, 4, dtype=torch.bool)
    good[1, 2] = False
    written = torch.zeros(2, 7, dtype=torch.bool)
    written[torch.arange(2)[:, None].expand(2, 4)[good], ids[good]] = True
    assert torch.equal((reference.gather_tokens_backward(tokens[:, :4], ids, 7) != 0).all(-1), written)
    dimages = reference.gather_patches_backward(randn(2, 4, 12), ids, [2, 2], None, [2, 3, 2, 14], torch.float64)
    assert torch.equal((dimages.unflatten(3, (7, 2)) != 0).all((1, 2, 4)), written)


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_bits_do_not_depend_on_layouts(layout):
    """Operands of a matrix product have one layout: others would be summed in other orders."""
    q, k, v, grad = (randn(1, 65, 2, 3) for _ in range(4))
    laid = [lay(x, layout) for x in (grad, q, k, v)]
    assert torch.equal(reference.attention(*laid[1:], None, None, 0.3), reference.attention(q, k, v, None, None, 0.3))
    expected = reference.attention_backward(grad, q, k, v, None, None, 0.3, False)
    found = reference.attention_backward(*laid, None, None, 0.3, False)
    assert all(map(torch.equal, found, expected))
    images, weight, ids = randn(1, 3, 16, 32), randn(64, 3, 16, 16), torch.arange(2)[None]
    rest = (None, None, None, None, None, torch.float64)
    expected = reference.embed_patches(images, ids, weight, *rest)
    assert torch.equal(reference.embed_patches(images, ids, lay(weight, layout), *rest), expected)
