"""Tests that every op must pass on all kernels. A test class names its op, a plain formula and its arguments."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    NARROW,
    TEST_ALL,
    TEST_TRITON,
    Errors,
    bits,
    cases,
    check_op,
    check_redrawn,
    check_same_bits,
    errors,
    group_label,
    grouped,
    label,
    leaves_of,
    prepare,
    run,
    widened,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Bad = tuple[dict[str, Any], type[Exception], str]
# a test that says nothing of a device's kernels: left out where FASTMIM_TEST_DEVICE is given
host = pytest.mark.host


def autocast() -> torch.autocast:
    """Turn on autocast to bfloat16 on the device of the op tests, which meta tensors do not have."""
    return torch.autocast("cpu" if DEVICE == "meta" else DEVICE, torch.bfloat16)


class Recorder(TorchDispatchMode):
    """Mode that keeps one call of each fastmim op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastmim":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


class Contract:
    """Tests of one op; `arguments()` without sizes makes a small odd sample in float64."""

    op: ClassVar[Callable[..., Any]]
    eager: ClassVar[Callable[..., Any]]
    arguments: Callable[..., dict[str, Any]]
    lists: ClassVar[dict[str, Sequence[Any]]] = {}
    options: ClassVar[dict[str, Sequence[Any]]] = {}
    layouts: ClassVar[Sequence[str]] = LAYOUTS
    leaves: ClassVar[Sequence[str]] = ()
    batched: ClassVar[Sequence[str]] = ()
    tiny: ClassVar[dict[str, Any]] = {}
    large: ClassVar[dict[str, Any]] = {}
    # sizes of samples at which kernels take another form
    forms: ClassVar[Sequence[dict[str, Any]]] = ({},)
    extremes: ClassVar[Sequence[dict[str, float]]] = ()
    bad: ClassVar[Sequence[Bad]] = ()

    def sample(self, dtype: torch.dtype = torch.float32, layout: str = "contiguous", **sizes: Any) -> dict[str, Any]:
        return prepare(self.arguments(**sizes), dtype, layout, self.leaves)

    def check(self, dtype: torch.dtype, layout: str, **sizes: Any) -> None:
        check_op(self.op, self.eager, self.sample(dtype, layout, **sizes), layout)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Take `case`, `form`, `extreme`, `refused` and `refused_...` from the rows of the class's tables."""
        if "case" in metafunc.fixturenames:
            rows = cases(self.options, dtype=DTYPES, layout=self.layouts, **self.lists)
            metafunc.parametrize("case", grouped(rows) if TEST_ALL else [[row] for row in rows], ids=group_label)
        if "form" in metafunc.fixturenames:
            metafunc.parametrize("form", self.forms, ids=lambda form: label(form) or "small")
        values = self.bad_values()
        first = {tuple(change): (change, *rest) for change, *rest in reversed(values)}  # of each argument
        compiled = values if TEST_ALL else list(first.values())[::-1]
        tables = {
            "extreme": self.extremes,
            "refused": self.bad,
            "refused_value": values,
            "refused_when_compiled": compiled,
        }
        for name, rows in tables.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, rows, ids=lambda row: "-".join(row if isinstance(row, dict) else row[0]))

    def bad_values(self) -> Sequence[Bad]:
        return ()

    # ---- values ----

    def test_close_to_float64(self, case):
        for row in case:
            try:
                self.check(**row)
            except Exception as error:
                raise AssertionError(label(row)) from error

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_empty_batch(self, dtype):
        self.check(dtype, "contiguous", batch=0)

    def test_same_bits_for_any_number_of_threads(self):
        arguments = self.sample(**self.large)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                results.append(run(self.op, arguments))
        finally:
            torch.set_num_threads(before)
        check_same_bits(results[0], results[1])
        check_same_bits(results[1], results[2])

    # ---- the dispatcher ----

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, requires_grad):
        """opcheck of the op, and of those that its gradient calls."""
        with Recorder() as recorder:
            run(self.op, self.sample() if requires_grad else prepare(self.arguments(), torch.float32, "contiguous", ()))
        assert recorder.calls
        for op, args in recorder.calls.items():
            if op.__name__.endswith("_backward.default"):  # is called with gradients off
                args = [value.detach() if isinstance(value, Tensor) else value for value in args]
            torch.library.opcheck(op, args)

    @host
    def test_meta_tensors_give_shapes(self):
        arguments = self.sample()
        shapes = {
            name: x.detach().to("meta").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for name, x in arguments.items()
        }
        found, expected = run(self.op, shapes), run(self.op, arguments)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert x.device.type == "meta" and (x.shape, x.dtype) == (expected[name].shape, expected[name].dtype), name

    def check_compiled(self, backend: str, draws: int) -> None:
        torch.compiler.reset()
        compiled = torch.compile(self.op, fullgraph=True, backend=backend)
        for draw in range(draws):
            arguments = self.sample()
            with torch._dynamo.config.patch(error_on_recompile=draw > 0):
                check_same_bits(run(compiled, arguments), run(self.op, arguments))

    @host
    def test_compiles_once_for_all_values(self):
        self.check_compiled("aot_eager", draws=2)

    # ---- bad input ----

    def refuse(self, op: Callable[..., Any], row: Bad) -> None:
        """Check that the call with the changed arguments raises, and writes none of them."""
        change, error, words = row
        arguments = self.sample()
        with torch.no_grad():
            arguments |= {name: new(arguments[name]) if callable(new) else new for name, new in change.items()}
        tensors = [x.detach() for x in arguments.values() if isinstance(x, Tensor) and x.device.type != "meta"]
        before = [x.clone() for x in tensors]
        with pytest.raises(error, match=words):
            op(**arguments)
        assert all(torch.equal(bits(now), bits(then)) for now, then in zip(tensors, before))

    @host
    def test_bad_input(self, refused):
        self.refuse(self.op, refused)

    @host
    def test_wrong_type_or_dtype(self):
        for name, value in self.sample().items():
            if isinstance(value, Tensor):
                self.refuse(self.op, ({name: "text"}, TypeError, f"{name} must be .*text|{name} must be .*str"))
                wrong = value.detach().long() if value.is_floating_point() else value.float()
                self.refuse(self.op, ({name: wrong}, TypeError, rf"{name} must be of dtype .*{wrong.dtype}"))


class ChecksValues(Contract):
    """Tests of an op whose kernel checks values, and so refuses `bad_values()` under torch.compile too."""

    @host
    def test_bad_value(self, refused_value):
        self.refuse(self.op, refused_value)

    @host
    def test_bad_value_under_compile(self, refused_when_compiled):
        torch.compiler.reset()
        self.refuse(torch.compile(self.op, fullgraph=True, backend="aot_eager"), refused_when_compiled)


class Differentiable(Contract):
    """Tests of an op with a gradient by one or more tensors."""

    twice: ClassVar[bool] = False
    # what autocast casts: the op is then that of these arguments in bfloat16; the others keep theirs
    cast: ClassVar[Sequence[str]] = ()
    autocast_dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32,)

    def small(self) -> tuple[Callable[..., Any], list[Tensor]]:
        """Return the op as a function of its leaves alone, and these, in float64."""
        arguments = self.sample(torch.float64, "offset", **self.tiny)
        leaves = leaves_of(arguments)
        return lambda *values: self.op(**{**arguments, **dict(zip(leaves, values))}), [arguments[n] for n in leaves]

    @host
    def test_gradcheck(self):
        function, values = self.small()
        torch.autograd.gradcheck(function, values)

    @host
    def test_second_derivative(self):
        function, values = self.small()
        if self.twice:
            torch.autograd.gradgradcheck(function, values)
        else:
            outputs = function(*values)
            output = outputs[0] if isinstance(outputs, tuple) else outputs
            grads = torch.autograd.grad(output.square().sum(), values, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                sum(grad.sum() for grad in grads).backward()

    def test_within_a_checkpoint(self):
        """Saved tensors are read once: a checkpoint recomputes them for one reading."""
        arguments = self.sample()
        checkpointed = partial(checkpoint, self.op, use_reentrant=False)
        check_same_bits(run(checkpointed, arguments), run(self.op, arguments))

    def test_gradients_asked_for_one_by_one(self):
        """A gradient does not depend on which others are asked for."""
        arguments = self.arguments()
        for leaves in ((), *((name,) for name in self.leaves)):
            check_op(self.op, self.eager, prepare(arguments, torch.float32, "contiguous", leaves))

    def test_other_floating_dtypes(self):
        """Each leaf may be of another dtype than the rest, and its gradient is of its own."""
        for name in self.mixed():
            for dtype in DTYPES:
                arguments = self.sample(torch.bfloat16)
                arguments[name] = arguments[name].detach().to(dtype).requires_grad_(name in self.leaves)
                ours = run(self.op, arguments)
                for leaf in leaves_of(arguments):
                    assert ours[f"gradient of {leaf}"].dtype == arguments[leaf].dtype
                check_redrawn(self.errors_in_bfloat16, arguments)

    def errors_in_bfloat16(self, arguments: dict[str, Any], noise: bool) -> dict[str, Errors]:
        """Measure the op's errors against those of rounding the exact results to bfloat16."""
        ours, exact = run(self.op, arguments), run(self.op, widened(arguments))
        return {what: errors(ours[what], exact[what].bfloat16(), exact[what], what) for what in ours}

    def mixed(self) -> Sequence[str]:
        """Return the names of arguments that need not share the dtype of the rest."""
        return ()

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    def test_extreme_magnitudes(self, extreme, dtype, form):
        arguments = self.arguments(**form)
        arguments |= {name: arguments[name].clamp(-2, 2) * scale for name, scale in extreme.items()}
        check_op(self.op, self.eager, prepare(arguments, dtype, "contiguous", self.leaves))

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_nan_stays_in_its_sample(self, dtype, form):
        arguments = self.arguments(**form)
        clean = run(self.op, prepare(arguments, dtype, "contiguous", self.leaves))
        for name in self.batched:
            poisoned = {**arguments, name: arguments[name].clone()}
            poisoned[name][1] = float("nan")
            results = run(self.op, prepare(poisoned, dtype, "contiguous", self.leaves))
            assert results["output 0"][1].isnan().any()
            for what in [what for what in clean if what.startswith("output") or what.split()[-1] in self.batched]:
                kept = [sample for sample in range(len(clean[what])) if sample != 1]
                assert torch.equal(bits(results[what][kept]), bits(clean[what][kept])), (name, what)

    def test_autocast(self):
        """Values and dtypes are those of the op on arguments cast by hand; float64 stays."""
        arguments = self.arguments()
        single = prepare(arguments, torch.float32, "contiguous", self.leaves)
        by_hand = single | {n: single[n].detach().bfloat16().requires_grad_(n in self.leaves) for n in self.cast}
        expected = run(self.op, by_hand)
        with autocast():
            found = run(self.op, single)
            double = run(self.op, prepare(arguments, torch.float64, "contiguous", self.leaves))
        outputs = [name for name in found if name.startswith("output")]
        assert [found[name].dtype for name in outputs] == list(self.autocast_dtypes)
        assert {value.dtype for value in double.values()} == {torch.float64}
        check_same_bits(
            {name: found[name] for name in outputs},
            {name: expected[name] for name in outputs},
        )
        for leaf in leaves_of(single):
            gradient = f"gradient of {leaf}"
            assert found[gradient].dtype == torch.float32
            assert torch.equal(found[gradient], expected[gradient].float()), gradient

    @host
    def test_mixed_devices(self):
        arguments = self.sample()
        tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        for name in tensors:
            self.refuse(
                self.op,
                ({name: lambda x: x.to("meta")}, ValueError, f"must have the same device; got .*{name} on meta"),
            )


def set_first(value: int) -> Callable[[Tensor], Tensor]:
    """Put `value` at the head of the first row."""

    def change(ids: Tensor) -> Tensor:
        ids = ids.clone()
        ids[0, 0] = value
        return ids

    return change


class Indexed(ChecksValues, Differentiable):
    """Tests of an op that reads tokens or patches by id.

    An op that writes at ids has no NaN for an unchecked one: it overrides `test_unchecked_ids_stay_in_their_sample`.
    """

    # for each argument of ids, how many the sample has to choose from
    limits: ClassVar[dict[str, int]]

    def bad_values(self) -> Sequence[Bad]:
        rows: list[Bad] = []
        for name, limit in self.limits.items():
            # 2^32 is 0 in 32 bits
            for value in (limit, -1, 2**32, -(2**63)):
                rows.append(
                    ({name: set_first(value)}, ValueError, rf"{name} must be in 0\.\.{limit - 1}; got {value}$")
                )
            rows.append(({name: lambda x: set_first(int(x[0, -1]))(x)}, ValueError, f"{name} must not repeat an id"))
        return rows

    @host
    def test_ids_of_wrong_shape(self):
        for name in self.limits:
            self.refuse(self.op, ({name: lambda x: x[0]}, ValueError, rf"{name} must have shape .*; got \("))
            self.refuse(self.op, ({name: lambda x: x[:-1]}, ValueError, rf"{name} must have shape .*; got \("))

    def test_int32_ids(self):
        arguments = self.sample()
        narrow = arguments | {name: arguments[name].int() for name in self.limits}
        check_same_bits(run(self.op, narrow), run(self.op, arguments))

    @pytest.mark.skipif(
        os.environ.get("FASTMIM_CHECK_IDS") == "1" or not (TEST_TRITON or DEVICE != "cpu"), reason="ids are looked at"
    )
    def test_unchecked_ids_stay_in_their_sample(self, monkeypatch):
        """An id that nobody checked reads NaN and writes nothing elsewhere, forward and backward."""
        if DEVICE == "cpu":
            monkeypatch.setattr("fastmim.reference.indexing.can_check", lambda x: False)
            for room in ("tokens", "patches", "loss"):
                monkeypatch.setattr(f"fastmim.kernels.{room}.check_ids", lambda *arguments: None)
        arguments = self.sample()
        clean = run(self.op, arguments)
        for name, limit in self.limits.items():
            for value in (limit, -1, 2**32, -(2**63)):
                found = run(self.op, arguments | {name: set_first(value)(arguments[name])})
                assert found["output 0"].isnan().any()
                for what in ("output 0", *(f"gradient of {leaf}" for leaf in self.batched)):
                    if found[what].dim():
                        assert torch.equal(bits(found[what][1:]), bits(clean[what][1:])), what
