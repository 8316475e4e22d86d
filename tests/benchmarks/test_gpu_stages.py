"""The stages of a flight, run on a CPU, some of them as if it were a GPU."""

import contextlib
import itertools
import json
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from runner import runner_kernels
from torch.overrides import TorchFunctionMode

from fastmim import _backends, reference
from gpu import clock, cuda_cpp, environment, loading, op_times, step_profile, steps, tune
from gpu.plans import BLOCKS, EAGER, GPU, GRAPH, OURS, REHEARSAL, SAME
from harness import rows
from rivals import op_cases
from rivals.sizes import Cell, Sizes, train_flops

# as a GPU's, at the sizes of a rehearsal; the reference stands for both backends
PRETENDED = replace(REHEARSAL, device="cuda", backends={"cuda": "reference", "triton": "reference"})


class OnTheCPU(TorchFunctionMode):
    """Context in which tensors for "cuda" are made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(value):
            return "cpu" if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


class Nothing:
    """Stand-in for a stream, and for the context that captures a graph."""

    def __init__(self, *args, **kwargs): ...

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def wait_stream(self, stream): ...

    def replay(self): ...


class Clock:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Replace the parts of torch.cuda that the stages call: a captured graph runs once, a replay does nothing."""
    for name in ("Stream", "CUDAGraph", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    card = SimpleNamespace(L2_cache_size=1 << 10, multi_processor_count=132, total_memory=1)
    for name, result in dict(
        current_stream=Nothing(), synchronize=None, empty_cache=None, get_device_properties=card, is_available=True,
        get_device_capability=(9, 0), get_device_name="NVIDIA H100", is_bf16_supported=True, max_memory_allocated=1,
        reset_peak_memory_stats=None, set_sync_debug_mode=None,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(op_cases, "DEVICE", "cuda")
    with OnTheCPU():
        yield


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Return the file of rows."""
    path = tmp_path / "rows.jsonl"
    monkeypatch.setenv(rows.FILE, str(path))
    for name in (rows.SINCE, rows.DEADLINE, rows.PATIENCE):
        monkeypatch.delenv(name, raising=False)
    return path


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_every_form_of_a_step_is_measured_and_agrees(pretended_gpu, kept):
    forms = ((OURS, EAGER), (OURS, GRAPH), (SAME, EAGER), (SAME, GRAPH))
    step = replace(PRETENDED.steps[0], forms=forms)
    jobs = [(steps.name_of(step, *form), partial(steps.measured, step, *form, PRETENDED)) for form in forms]
    rows.run("steps", jobs, 60.0, after=partial(steps.judge, "steps"))
    found = [row for name, row in rows.stored("steps").items() if name != rows.PLANNED]
    # a replay does nothing here, so that what the steps of a graph lead to is another loss
    wrong = {row["how"]: row["wrong"] for row in found if row.get("wrong")}
    assert wrong.keys() == {GRAPH} and wrong[GRAPH].startswith("last_loss")
    assert [(row["form"], row["how"]) for row in found] == list(forms)
    for row in found:
        assert row["milliseconds"] > 0 and row["host_milliseconds"] > 0 and row["peak_memory_bytes"] and row["loss"] > 0
    assert (
        found[0]["loss"] == found[1]["loss"] and "synchronisations" in found[0] and "synchronisations" not in found[1]
    )


def test_a_step_compiled_by_block_is_the_same_step(kept):
    step = REHEARSAL.compiled[0]
    eager, compiled = (steps.measured(step, OURS, how, REHEARSAL) for how in (EAGER, BLOCKS))
    assert steps.disagreement(compiled, eager) is None


def step_row(form: str, how: str, **changes) -> tuple[str, dict]:
    row = {"form": form, "how": how, "decodes_all": False, "loss": 1.2, "gradient_norm": 2.0, "last_loss": 1.0}
    return steps.name_of(GPU.steps[0], form, how), {**row, **changes}


def test_a_row_that_disagrees_is_marked(kept):
    wrong = dict(loss=1.21)
    for name, row in (step_row(OURS, EAGER, **wrong), step_row(OURS, GRAPH), step_row("huggingface", EAGER)):
        rows.record("steps", name, **row)
        steps.judge("steps", name)
    marked = {row["how"] for name, row in rows.stored("steps").items() if row.get("wrong")}
    assert marked == {GRAPH, EAGER}  # beside the first, as long as plain PyTorch's is not there
    name, row = step_row(SAME, EAGER)
    rows.record("steps", name, **row)
    steps.judge("steps", name)
    found = rows.stored("steps")
    ours, graph, theirs = (found[step_row(*form)[0]] for form in ((OURS, EAGER), (OURS, GRAPH), (SAME, EAGER)))
    assert "loss 1.21 beside 1.2 of plain-gather, eager" in ours["wrong"]
    assert not graph.get("wrong") and not theirs.get("wrong")
    assert steps.disagreement({**theirs, "loss": float("nan")}, theirs)
    assert "gradient_norm" in steps.disagreement({**theirs, "gradient_norm": 2.1}, theirs)


def test_rows_of_other_steps_are_not_compared(kept):
    for step, loss in zip(GPU.steps, (1.0, 2.0)):
        rows.record("steps", steps.name_of(step, OURS, EAGER), **step_row(OURS, EAGER, loss=loss)[1])
        rows.record("steps", steps.name_of(step, SAME, EAGER), **step_row(SAME, EAGER, loss=loss)[1])
        steps.judge("steps", steps.name_of(step, SAME, EAGER))
    assert not [row for row in rows.stored("steps").values() if row.get("wrong")]


def test_the_valuable_steps_come_first():
    first = GPU.steps[0]
    assert (first.model, first.batch_size, first.mask_ratio) == ("large", 256, 0.75)
    assert first.forms[:2] == ((OURS, EAGER), (OURS, GRAPH)) and GPU.steps[1].batch_size == 1024


# ---- profile ---------------------------------------------------------------------------------------------------------


def test_kernels_are_summed_by_kind():
    kernels = [
        ("nvjet_tst_128x256", 0.0, 2.0),
        ("tile_forward_kernel", 2.5, 3.5),
        ("nvjet_tst_64x64", 3.4, 5.2),  # beside the one before it
        ("vectorized_elementwise_kernel", 6.4, 6.5),
    ]
    found = step_profile.summary(kernels[::-1], {"matmul": {"FLOP": 7.6e9}, "attention": {"bytes": 1e6}})
    assert found["from first to last kernel"] == 6.5 and found["gaps"] == pytest.approx(1.7) and found["launches"] == 4
    assert found["by kind"]["matmul"] == pytest.approx({"milliseconds": 3.8, "launches": 2, "FLOP per s": 2e12})
    assert found["by kind"]["attention"]["bytes per s"] == pytest.approx(1e9)
    assert found["kernels"][0] == {"kernel": kernels[0][0], "kind": "matmul", "milliseconds": 2.0, "launches": 1}
    assert step_profile.REST in found["by kind"]


def test_amounts_of_a_step():
    sizes, cell = Sizes(224, 16, 196, 768, 1024, 24, 16, 512, 8, 16), Cell(0.75, 1.0)
    known = step_profile.amounts(sizes, cell, 256, 330_000_000)
    assert 0.9 < known["matmul"]["FLOP"] / (256 * train_flops(sizes, "fastmim", cell)) < 1
    # a layer of the encoder: two products forward and five backward, of 50 by 50 by 64 in each of 256 x 16 heads
    assert known["attention"]["FLOP"] > 24 * 7 * 2 * 50 * 50 * 64 * 256 * 16
    assert known["optimiser"]["bytes"] == 28 * 330_000_000


def test_a_step_is_profiled():
    found = step_profile.profiled(REHEARSAL)
    assert found["launches"] > 100 and found["milliseconds"] > 0 and found["kernels"]


# ---- ops -------------------------------------------------------------------------------------------------------------


def test_every_op_is_measured(pretended_gpu, kept):
    """Check that no form fails but those that a CPU lacks."""
    rows.record("environment", "ceilings", bytes=1e12, flops=1e14)
    rows.run("ops", op_times.jobs(PRETENDED), 60.0)
    found = {name: row for name, row in rows.stored("ops").items() if name != rows.PLANNED}
    assert not {name: text for name, row in found.items() if (text := rows.problem(row))}
    failed = {form for row in found.values() for form in row.get("errors", {})}
    assert failed <= {"sdpa cudnn", "sdpa efficient", "sdpa flash", "varlen"}
    assert len(found) == len(op_times.jobs(PRETENDED)) > 10
    attention = found["attention S 3, head 32, batch 3"]
    assert {"forward", "backward", "both"} <= attention.keys() and attention["forward"]["share of floor"] > 0
    changing = found["attention, another length each step"]
    assert changing["milliseconds"]["fastmim"] > 0 and changing["slowest"]["sdpa"] > 0


def test_a_result_that_is_off_is_told(pretended_gpu, kept):
    x = torch.randn(4, 4)
    row = op_times.compared({"fastmim": lambda t: t * 1.1, "eager": lambda t: t * 1.0}, [x], {}, PRETENDED)
    assert "from that of eager" in row["wrong"]

    def fail(_):
        raise RuntimeError("no room")

    row = op_times.compared({"fastmim": fail, "eager": lambda t: t}, [x], {}, PRETENDED)
    assert "no room" in row["error"] and row["forward"]["seconds"].keys() == {"eager"}
    assert op_times.apart({"fastmim": torch.full((2,), float("nan")), "eager": torch.ones(2)})


def test_sizes_of_a_gpu_are_those_that_fill_it():
    names = [name for name, _ in op_times.jobs(GPU)]
    assert len(names) == len(set(names)) > 30 and "S 3," in names[0]
    lengths = GPU.changing[3]
    assert len({lengths[0] + 1, *lengths}) == len(lengths) + 1  # none was seen before


def test_seconds_of_a_call_on_a_cpu():
    spent = clock.seconds_of(lambda: time.sleep(0.01), REHEARSAL)
    assert 0.01 <= spent < 0.1


# ---- kernels one by one ----------------------------------------------------------------------------------------------


def test_backends_are_compared(pretended_gpu, kept):
    found = {name: cuda_cpp.compared(make, PRETENDED) for name, make in cuda_cpp.large(PRETENDED)}
    ops = {op for row in found.values() for op in row["ops"]}
    assert ops == runner_kernels().keys()
    assert all(
        figures["apart"] == 0 and len(figures["seconds"]) == 2 for r in found.values() for figures in r["ops"].values()
    )
    json.dumps(found)


def test_the_check_sees_what_is_wrong(monkeypatch):
    """On the runner: each kernel passes, a kernel that is off, or leaves something unwritten, is named."""
    served = runner_kernels()

    def host(_, op):
        return served[op]

    monkeypatch.setattr(cuda_cpp, "launcher", host)
    monkeypatch.setattr(_backends, "cuda_ops", served.keys())
    found = {name: cuda_cpp.checked("cuda", make) for name, make in cuda_cpp.small(REHEARSAL)}
    assert not [row["wrong"] for row in found.values() if "wrong" in row]
    assert {op for row in found.values() for op in row["errors_by_op"]} == served.keys()

    def off(backend, op):
        kernel = host(backend, op)
        return (lambda *args: kernel(*args) * 1.1) if op == "gather_patches" else kernel

    monkeypatch.setattr(cuda_cpp, "launcher", off)
    wrong = [
        row["wrong"] for _, make in cuda_cpp.small(REHEARSAL) if "wrong" in (row := cuda_cpp.checked("cuda", make))
    ]
    assert len(wrong) == 3 and all(line.startswith("gather_patches of [(2, 3, 64, 64)") for line in wrong)

    def unwritten(backend, op):
        return (
            (lambda *args: torch.empty_like(reference.gather_patches(*args)))
            if op == "gather_patches"
            else host(backend, op)
        )

    monkeypatch.setattr(cuda_cpp, "launcher", unwritten)
    wrong = [
        row["wrong"] for _, make in cuda_cpp.small(REHEARSAL) if "wrong" in (row := cuda_cpp.checked("cuda", make))
    ]
    assert len(wrong) == 3 and all("is inf from float64" in line for line in wrong)


def test_every_form_of_the_kernels_is_checked():
    names = [name for name, _ in cuda_cpp.small(GPU)]
    assert len(names) == len(set(names)) == 2 * len(GPU.forms) + 4
    assert {queries for queries, _, _ in GPU.forms} >= {1, 16, 17, 64, 65, 129, 197}


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_the_machine_is_described(pretended_gpu):
    found = environment.machine(PRETENDED)
    assert found["card"] == "NVIDIA H100" and found["capability"] == [9, 0] and found["packages"]["torch"]
    rates = environment.ceilings(PRETENDED)
    assert rates["bytes"] > 0 and rates["flops"] > 0
    assert {"ops", "missing", "cuda build"} <= environment.served().keys()


def test_loading_is_measured():
    row = loading.loaded("simplejpeg", images=6, batch_size=3, device="cpu")
    assert row["images_per_second"] > 0 and row["most grey levels off"] <= 2 and row["device"] == "cpu"


# ---- variants --------------------------------------------------------------------------------------------------------


def test_variants_are_held_to_the_current_results():
    state, calls = SimpleNamespace(factor=1.0), itertools.count()

    def call():
        return torch.ones(3) * state.factor, torch.full((2,), 1.0 + next(calls) * state.drift)

    variants = {"current": contextlib.nullcontext}
    state.drift = 0.0
    for name, options in dict(same={}, far={"factor": 1.01}, restless={"drift": 1e-3}, broken={"no": 1}).items():
        variants[name] = tune.replaced(state, **options) if options else contextlib.nullcontext
    row = tune.tuned(lambda: tune.Case(call, variants, 12.0, 3.0), REHEARSAL)
    assert row["variants"].keys() == {"current", "same", "far", "restless", "current, again"}
    assert all(numbers["microseconds"] > 0 for numbers in row["variants"].values())
    assert row["errors"].keys() == {"broken"}
    far, restless = row["wrong"].split("; ")
    assert far.startswith("far: result 0 is 0.01") and restless == "restless: result 1 is another in a second call"
