"""The stages of a flight, and the processes that each runs in."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from gpu.plans import GPU, REHEARSAL

HERE = Path(__file__).parent
INTERPRETER = {"FASTMIM_KERNELS": "triton", "TRITON_INTERPRET": "1"}


class Visit(Protocol):
    """The properties of a flight that its stages depend on."""

    rehearse: list[str]  # options for a stage's script
    suspected: list[str]  # cases that the first visit found wrong
    cache: Path  # Triton's cache
    out: Path


@dataclass(frozen=True)
class Command:
    """A process of a stage; earlier ones leave it `kept` seconds, or half of the rest if that is less."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    kept: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Commands that run for at most `seconds`, which grow with the budget; earlier stages leave `kept` of them."""

    seconds: float
    commands: Callable[[Visit], list[Command]]
    kept: float = 0.0


def script(name: str, *args: str, interpret: bool = False) -> Callable[[Visit], list[Command]]:
    """Return a stage's only command, a script of gpu/; with `interpret` a rehearsal runs it in Triton's interpreter."""

    def commands(flight: Visit) -> list[Command]:
        env = INTERPRETER if interpret and flight.rehearse else {}
        return [Command([sys.executable, str(HERE / name), *flight.rehearse, *args], env)]

    return commands


def suites(flight: Visit, cuda: bool = False) -> list[Command]:
    """Run the op suite, as tests/conftest.py selects it, and the tests that need a GPU; or both on CUDA C++.

    The latter call the kernels through fastmim's own dispatch. Neither checks values of ids, which would synchronise.
    """
    plan = REHEARSAL if flight.rehearse else GPU
    processes = str(min(plan.processes, os.cpu_count() or 1))
    of_ops = {"FASTMIM_TEST_DEVICE": plan.device, "FASTMIM_TEST_KERNELS": "cuda" if cuda else "triton"}
    of_ops |= {"TRITON_INTERPRET": "1"} if flight.rehearse else {}
    of_device = {"FASTMIM_KERNELS": "cuda"} if cuda else {}
    found = []
    for args, env, kept in (([*plan.op_suite, "-n", processes], of_ops, 0.0), (plan.device_suite, of_device, 35.0)):
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu.pytest_rows", *args]
        settings = {"FASTMIM_SUITE": args[0] + ", CUDA C++" * cuda, "FASTMIM_CHECK_IDS": "0"}
        found.append(Command(pytest, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **settings, **env}, kept))
    return found


def backends(flight: Visit) -> list[Command]:
    """Check kernels at small sizes, CUDA C++ first: Triton's were in the smoke test at other sizes."""
    found = [script("cuda_cpp.py", "--backend", backend, interpret=True)(flight) for backend in ("cuda", "triton")]
    return [replace(command, kept=15.0) for commands in found for command in commands]


def suspects(flight: Visit) -> list[Command]:
    """Run memcheck on the cases that the first visit's smoke test found wrong."""
    return (
        script("memcheck.py", "--stage", "suspects", "--smoke", *flight.suspected)(flight) if flight.suspected else []
    )


def cache(flight: Visit) -> list[Command]:
    return [Command([sys.executable, str(HERE / "pack_new.py"), str(flight.cache), str(flight.out)])]


STAGES = {
    "environment": Stage(45, script("environment.py")),
    "smoke": Stage(85, script("smoke.py", "--processes", "10")),
    "steps": Stage(110, script("steps.py")),
    "profile": Stage(30, script("step_profile.py")),
    "host": Stage(20, script("host_profile.py")),
    "suites": Stage(150, suites),
    "cuda-suites": Stage(150, partial(suites, cuda=True)),
    "cache": Stage(20, cache, kept=10),
    "suspects": Stage(90, suspects),
    "backends": Stage(50, backends),
    "ops": Stage(75, script("op_times.py", interpret=True), kept=20),
    "compare": Stage(65, script("cuda_cpp.py", "--stage", "compare", interpret=True)),
    "compiled": Stage(75, script("steps.py", "--stage", "compiled")),
    "memcheck": Stage(60, script("memcheck.py", interpret=True)),
    "loader": Stage(120, script("loading.py")),
    "tune": Stage(60, script("tune.py", interpret=True)),
}
FIRST = ("environment", "smoke", "steps", "profile", "host", "suites", "cache")
SECOND = ("environment", "suspects", "backends", "ops", "compare", "compiled", "memcheck")
VISITS = {"first": FIRST, "second": SECOND, "all": (*FIRST[:-1], *SECOND[1:], "cuda-suites", "loader", "tune", "cache")}
# seconds for which the limits of the stages are set
BUDGETS = {"first": 330.0, "second": 270.0, "all": 900.0}
