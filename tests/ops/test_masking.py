"""Random masking without a sort."""

import math

import pytest
import torch
from cases import BATCHES, DEVICE, DTYPES, KEEPS, LAYOUTS, LENGTHS, check_same_bits, generator, randn, run
from contract import ChecksValues, host
from hypothesis import given
from hypothesis import strategies as st

from fastmim import ops, reference

SEEDS = torch.tensor([0, 1, -1, 2**32, 2**63 - 1, -(2**63), 123456789])


def sorted_twice(batch, num_patches, len_keep, len_predict, noise):
    """Compute facebookresearch/mae's two argsorts, stable so that ties go by index."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :len_keep], ids_shuffle[:, len_keep : len_keep + len_predict], ids_restore


class TestRandomMasking(ChecksValues):
    op = staticmethod(ops.random_masking)
    eager = staticmethod(sorted_twice)
    lists = dict(batch=BATCHES, length=LENGTHS, keep=KEEPS)
    options = dict(predict=(0, 1, "all"))
    large = dict(batch=64, length=257)
    bad = (
        (dict(batch=-1), ValueError, "batch must be at least 0, got -1"),
        (dict(batch=3.0), TypeError, "batch must be an int, got float 3.0"),
        (dict(batch=True), TypeError, "batch must be an int, got bool True"),
        (dict(num_patches=0), ValueError, "num_patches must be at least 1, got 0"),
        (dict(len_keep=0), ValueError, r"len_keep must be in 1\.\.7, got 0"),
        (dict(len_keep=8), ValueError, r"len_keep must be in 1\.\.7, got 8"),
        (dict(len_keep=2.0), TypeError, "len_keep must be an int, got float 2.0"),
        (dict(len_predict=-1), ValueError, r"len_predict must be in 0\.\.5, got -1"),
        (dict(len_predict=6), ValueError, r"len_predict must be in 0\.\.5, got 6"),
        (dict(batch=4), ValueError, r"noise must have shape \(4, 7\).*; got \(3, 7\)"),
        (dict(noise=lambda x: x[:, 1:]), ValueError, r"noise must have shape \(3, 7\).*; got \(3, 6\)"),
        (dict(noise=lambda x: x[0]), ValueError, r"noise must have shape \(3, 7\).*; got \(7,\)"),
        (dict(seeds=SEEDS[:3]), ValueError, "give one of noise, seeds and generator, got several"),
        (dict(generator=torch.Generator()), ValueError, "give one of noise, seeds and generator, got several"),
        (dict(noise=None, seeds=SEEDS), ValueError, r"seeds must have shape \(3\).*; got \(7,\)"),
        (dict(noise=None, seeds=SEEDS[:3].int()), TypeError, "seeds must be of dtype int64, got torch.int32"),
        (dict(noise=None, seeds=[1, 2, 3]), TypeError, "seeds must be a torch.Tensor, got list"),
        (dict(noise=None, generator=3), TypeError, "generator must be a torch.Generator, got int"),
        (dict(device="meta"), ValueError, "device must be that of noise, cpu; got meta"),
        (dict(noise=None, seeds=SEEDS[:3], device="meta"), ValueError, "device must be that of seeds, cpu; got meta"),
    )

    def arguments(self, batch=3, length=7, keep=2, predict=3):
        keep = length if keep == "all" else min(keep, length)
        predict = length - keep if predict == "all" else min(predict, length - keep)
        return dict(batch=batch, num_patches=length, len_keep=keep, len_predict=predict, noise=randn(batch, length))

    def bad_values(self):
        def put_nan(noise):
            return torch.where(torch.arange(7, device=noise.device) == 6, math.nan, noise)

        return [(dict(noise=put_nan), ValueError, "noise.* must not hold NaN")]

    def check(self, dtype, layout, **sizes):
        """Check results element for element, and that they are dense and int64."""
        arguments = self.sample(dtype, layout, **sizes)
        ours = run(self.op, arguments)
        check_same_bits(ours, run(self.eager, arguments))
        assert all(ids.is_contiguous() and ids.dtype == torch.int64 for ids in ours.values())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_transposed_noise(self, dtype):
        self.check(dtype, "transposed", batch=5, length=2, keep=1, predict=0)

    @pytest.mark.parametrize("length", [1000, 5003])
    def test_long_rows(self, length):
        self.check(torch.float32, "contiguous", batch=2, length=length, keep=length // 4, predict="all")

    def test_predicts_all_that_is_removed_by_default(self):
        arguments = self.sample(predict="all")
        default = {name: value for name, value in arguments.items() if name != "len_predict"}
        check_same_bits(run(self.op, default), run(self.op, arguments))

    def test_rank_by_its_definition(self):
        """A rank counts smaller noises, equal ones by index; -0 equals 0, infinity and subnormals are ordered too."""
        values = [0.0, -0.0, 1.0, -math.inf, 1e-45, math.inf, 1.0, -1e-45, 0.0, math.inf, -1.0, 1e-40]
        rank = [sum((v, i) < (values[j], j) for i, v in enumerate(values)) for j in range(len(values))]
        _, _, ids_restore = ops.random_masking(1, len(values), 3, noise=torch.tensor([values], device=DEVICE))
        assert ids_restore.tolist() == [rank]

    def test_equal_noise(self):
        ids_keep, ids_predict, ids_restore = ops.random_masking(
            2, 50, 10, noise=torch.full((2, 50), 0.25, device=DEVICE)
        )
        in_order = torch.arange(50, device=DEVICE).expand(2, -1)
        assert torch.equal(torch.cat([ids_keep, ids_predict], dim=1), in_order)
        assert torch.equal(ids_restore, in_order)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_seeds_are_philox_keys(self, length):
        by_seeds = ops.random_masking(len(SEEDS), length, 1, seeds=SEEDS.to(DEVICE))
        noise = reference.philox(SEEDS, length).to(DEVICE)  # up to 2^32: exact in float64 only
        by_noise = ops.random_masking(len(SEEDS), length, 1, noise=noise.double())
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_seeds, by_noise))

    def test_rows_depend_on_their_seed_alone(self):
        seeds = SEEDS.to(DEVICE)
        whole = ops.random_masking(7, 65, 9, seeds=seeds)
        for row in range(7):
            alone = ops.random_masking(1, 65, 9, seeds=seeds[row : row + 1])
            assert all(torch.equal(ids[0], ids_of_all[row]) for ids, ids_of_all in zip(alone, whole))

    def test_strided_seeds(self):
        seeds = torch.stack([SEEDS, SEEDS + 1], dim=1).to(DEVICE)[:, 0]
        strided, dense = (ops.random_masking(7, 65, 9, seeds=s) for s in (seeds, seeds.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(strided, dense))

    def test_generator_draws_the_seeds(self):
        draws = [ops.random_masking(4, 50, 10, generator=generator(3))[2] for _ in range(2)]
        assert torch.equal(*draws)
        drawn_twice = generator(3)
        assert not torch.equal(*(ops.random_masking(4, 50, 10, generator=drawn_twice)[2] for _ in range(2)))

    def test_default_generator_is_that_of_torch(self):
        draws = []
        for _ in range(2):
            torch.manual_seed(5)
            draws.append(ops.random_masking(4, 50, 10, device=DEVICE)[2])
        assert torch.equal(*draws)
        assert not torch.equal(draws[1], ops.random_masking(4, 50, 10, device=DEVICE)[2])

    def test_noise_that_requires_grad_gets_none(self):
        assert not any(
            ids.requires_grad for ids in ops.random_masking(3, 7, 2, noise=torch.rand(3, 7).to(DEVICE).requires_grad_())
        )

    @host
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled_masks_are_drawn_anew(self, backend):
        torch.compiler.reset()
        draw = torch.compile(lambda: ops.random_masking(4, 50, 10), fullgraph=True, backend=backend)
        first, second = draw()[2], draw()[2]
        assert not torch.equal(first, second)
        for ids_restore in (first, second):
            assert torch.equal(ids_restore.sort(1).values, torch.arange(50).expand(4, -1))

    @host
    def test_compiles_with_seeds(self):
        torch.compiler.reset()
        compiled = torch.compile(ops.random_masking, fullgraph=True, backend="aot_eager")
        for seeds in (SEEDS, SEEDS + 1):
            ours, theirs = compiled(7, 65, 9, seeds=seeds), ops.random_masking(7, 65, 9, seeds=seeds)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))

    @given(
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        batch=st.integers(0, 5),
        length=st.integers(1, 300),
        keep=st.integers(1, 300),
        predict=st.integers(0, 300),
    )
    def test_fuzz(self, **case):
        self.check(**case)
