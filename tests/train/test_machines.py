"""Several machines, rehearsed on one: what a run does when a host, its link, its disk or its clock fails.

Three hosts, each a set of namespaces, with torchrun's c10d rendezvous and a process each. Times are limits for a loaded
machine: a run of twelve steps takes a second, a fault as long as `lost_after` and torchrun's own waiting.
"""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import TEST_ALL
from machines import Machine, Network, Starter, wait
from safetensors.torch import load_file
from small_run import SETTINGS, flat

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's"),
    pytest.mark.xdist_group("machines"),
]
everything = pytest.mark.skipif(not TEST_ALL, reason="takes a minute or more: make test-all")

HOSTS = "alpha", "beta", "gamma"
LOST_AFTER = 8
# seconds; torchrun kills a process that doesn't end 30 s after SIGTERM
LIMIT = 180


class Rehearsal:
    """Runs on a network of machines.

    Args:
        network: with its machines.
        starter: starts torchrun.
        photos: the data.
    """

    def __init__(self, network: Network, starter: Starter, photos: Path, **changes) -> None:
        self.network, self.starter = network, starter
        self.logs = itertools.count()
        self.gate = network.folder / "gate"
        self.open(10**6)
        self.config = network.folder / "run.toml"
        settings = {
            **SETTINGS,
            "data": str(photos),
            "output_dir": str(network.folder / "shared" / "run"),
            "batch_size": 6,
            "lost_after": LOST_AFTER,
            **changes,
        }
        self.config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in flat(settings)))
        self.run = network.shared / "run"

    def open(self, step: int) -> None:
        """Let runs take the steps up to `step`."""
        aside = self.gate.with_suffix(".new")
        aside.write_text(str(step))
        aside.replace(self.gate)

    def start(self, machine: Machine, *options: str, nodes: str = "3", endpoint: str = "alpha", starter=None):
        """Start torchrun on a machine."""
        argv = [
            *("--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "fastmim"),
            *("--rdzv-endpoint", f"{endpoint}:29400", "--local-addr", machine.address, "--monitor-interval", "0.2"),
            *("--rdzv-conf", "last_call_timeout=3,read_timeout=10", *options, str(self.config)),
        ]
        at = argv.index(str(self.config))
        argv[at:at] = ["pretrain"]
        log = self.network.folder / f"{machine.name}-{next(self.logs)}.log"
        return (starter or self.starter).start(machine, argv, self.gate, log)

    def wait_for_step(self, step: int, limit: float = LIMIT) -> None:
        """Wait until metrics of a step are written."""
        metrics = self.run / "metrics.jsonl"
        wait(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}", limit)

    def wait_for_checkpoint(self, step: int, limit: float = LIMIT) -> None:
        folder = self.run / "checkpoints" / f"step-{step:08d}"
        wait(folder.exists, f"checkpoint of step {step}", limit)

    @property
    def weights(self) -> bytes:
        return (self.run / "final" / "model.safetensors").read_bytes()


def finish(*jobs, limit: float = LIMIT) -> list[int]:
    """Wait for torchrun on each machine; return the exit statuses."""
    wait(lambda: all(job.status is not None for job in jobs), "the end of torchrun", limit)
    return [job.status for job in jobs]


def near(ours: Path, theirs: Path) -> bool:
    """Return whether weights in float64 differ by rounding alone."""
    first, second = (load_file(path / "final" / "model.safetensors") for path in (ours, theirs))
    assert first.keys() == second.keys()
    return all((first[name] - second[name]).abs().max() < 1e-9 for name in first)


@pytest.fixture(scope="module")
def starter():
    with Starter() as starter:
        yield starter


@pytest.fixture
def network(tmp_path):
    try:
        network = Network(tmp_path)
    except OSError as error:
        pytest.skip(f"namespaces can't be made here: {error}")
    with network:
        yield network


@pytest.fixture
def rehearsal(network, starter, photos):
    rehearsal = Rehearsal(network, starter, photos, dtype="float64")
    yield rehearsal
    for log in sorted(network.folder.glob("*.log")):
        print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, starter, photos):
    """Return the folder of a run that nothing disturbs, on three machines."""
    try:
        network = Network(tmp_path_factory.mktemp("undisturbed"))
    except OSError as error:
        pytest.skip(f"namespaces can't be made here: {error}")
    with network:
        plain = Rehearsal(network, starter, photos, dtype="float64")
        jobs = [plain.start(machine) for machine in network.connected(*HOSTS)]
        assert finish(*jobs) == [0, 0, 0], "\n".join(job.output for job in jobs)
        folder = network.folder / "kept"
        (folder / "final").mkdir(parents=True)
        (folder / "final" / "model.safetensors").write_bytes(plain.weights)
    return folder


def check_same(rehearsal: Rehearsal, undisturbed: Path) -> None:
    """Check that a run of three processes has the weights of the undisturbed one, bit for bit."""
    assert rehearsal.weights == (undisturbed / "final" / "model.safetensors").read_bytes()


ELASTIC = "--max-restarts", "3"
# 5 s times 1000
PATIENT = "--rdzv-conf", "last_call_timeout=3,read_timeout=10,keep_alive_max_attempt=1000"


def test_a_host_dies_and_another_joins(rehearsal, network, undisturbed):
    """Cut the power of a host; the job continues on the others and a new one, from the last checkpoint."""
    alpha, beta, gamma = network.connected(*HOSTS)
    rehearsal.open(6)
    jobs = [rehearsal.start(host, *ELASTIC, nodes="2:3") for host in (alpha, beta, gamma)]
    rehearsal.wait_for_step(6)
    rehearsal.wait_for_checkpoint(4)
    gamma.cut_power()
    (delta,) = network.connected("delta")
    jobs[2:] = [rehearsal.start(delta, *ELASTIC, nodes="2:3")]
    rehearsal.open(12)
    assert finish(*jobs) == [0, 0, 0]
    messages = [line for job in jobs for line in job.messages()]
    assert any("on gamma gave no sign of life for" in line for line in messages), messages
    assert any("going on from step 4; 2 logged steps are repeated" in line for line in messages), messages
    check_same(rehearsal, undisturbed)


@everything
def test_a_host_dies_and_none_joins(rehearsal, network, undisturbed):
    """Cut the power of a host; the job continues on two."""
    alpha, beta, gamma = network.connected(*HOSTS)
    rehearsal.open(6)
    jobs = [rehearsal.start(host, *ELASTIC, nodes="2:3") for host in (alpha, beta, gamma)]
    rehearsal.wait_for_step(6)
    rehearsal.wait_for_checkpoint(4)
    gamma.cut_power()
    rehearsal.open(12)
    assert finish(*jobs[:2]) == [0, 0]
    assert near(rehearsal.run, undisturbed)


@everything
def test_a_short_break_of_a_link_is_survived(rehearsal, network, undisturbed):
    """Pull a cable for half of lost_after: no process ends."""
    hosts = network.connected(*HOSTS)
    rehearsal.open(6)
    jobs = [rehearsal.start(host) for host in hosts]
    rehearsal.wait_for_step(6)
    hosts[2].set_link(False)
    rehearsal.open(12)
    time.sleep(LOST_AFTER / 2)
    assert not (rehearsal.run / "final").exists()
    hosts[2].set_link(True)
    assert finish(*jobs) == [0, 0, 0]
    assert not any("no sign of life" in line or "going on" in line for job in jobs for line in job.messages())
    check_same(rehearsal, undisturbed)


@everything
def test_a_link_breaks_and_comes_back(rehearsal, network, undisturbed):
    """Pull a cable until all processes have ended; plugged in again, torchrun's restart continues on three hosts."""
    hosts = network.connected(*HOSTS)
    rehearsal.open(6)
    jobs = [rehearsal.start(host, *ELASTIC) for host in hosts]
    rehearsal.wait_for_step(6)
    rehearsal.wait_for_checkpoint(4)
    hosts[2].set_link(False)
    rehearsal.open(12)
    wait(lambda: all("no sign of life" in job.output for job in jobs), "verdicts on all hosts", LIMIT)
    hosts[2].set_link(True)
    wait(lambda: any(job.status is not None for job in jobs), "the end of torchrun on a host", LIMIT)
    if jobs[2].status:
        # torchrun on the host that was cut off may have given up the rendezvous: as a supervisor, start it again
        jobs[2] = rehearsal.start(hosts[2], *ELASTIC)
    assert finish(*jobs) == [0, 0, 0]
    check_same(rehearsal, undisturbed)


@everything
def test_the_rendezvous_host_dies(rehearsal, network, undisturbed):
    """Cut the power of the host of torchrun's rendezvous: all processes end, and the job continues elsewhere.

    torchrun itself waits until the kernel gives up the connection, up to 16 minutes, unless a supervisor ends it.
    """
    alpha, *others = network.connected(*HOSTS)
    rehearsal.open(6)
    jobs = [rehearsal.start(host, *ELASTIC) for host in (alpha, *others)]
    rehearsal.wait_for_step(6)
    rehearsal.wait_for_checkpoint(4)
    alpha.cut_power()
    rehearsal.open(12)
    line = "on alpha gave no sign of life for"
    wait(lambda: all(any(line in messages for messages in job.messages()) for job in jobs[1:]), "verdicts", LIMIT)
    for host in others:
        host.cut_power()
    assert all(finish(*jobs[1:]))
    hosts = network.connected("beta", "gamma", "delta")
    jobs = [rehearsal.start(host, *ELASTIC, endpoint="beta") for host in hosts]
    assert finish(*jobs) == [0, 0, 0]
    check_same(rehearsal, undisturbed)


@everything
@pytest.mark.parametrize("fault", ["slow", "delayed", "dropped"])
def test_a_poor_network(rehearsal, network, undisturbed, fault):
    """Slow the packets of a host to 2 Mbit/s, delay them by 50 ms, or drop one in twenty."""
    machines = network.connected("alpha", "beta")
    gamma = network.machine("gamma")
    if fault == "slow":
        gamma.connect()
        for device in ((network, "gamma"), (gamma, "eth0")):
            device[0].run(*f"tc qdisc add dev {device[1]} root tbf rate 2mbit burst 16kb latency 400ms".split())
    else:
        delay, loss = {"delayed": (0.05, 0), "dropped": (0.002, 0.05)}[fault]
        gamma.connect_through_relay(delay, loss)
    jobs = [rehearsal.start(host) for host in (*machines, gamma)]
    assert finish(*jobs) == [0, 0, 0]
    check_same(rehearsal, undisturbed)


def first_host(rehearsal: Rehearsal, machines: list[Machine]) -> int:
    """Return which of the machines has rank 0, which holds the lock."""
    holder = json.loads((rehearsal.run / ".fastmim.lock").read_text())["host"]
    return [host.name for host in machines].index(holder)


@everything
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_the_shared_folder_fails(rehearsal, network, undisturbed, fault):
    """Fill the shared folder, or make it read-only on the first process's host: the run ends, later it continues."""
    hosts = network.connected(*HOSTS)
    rehearsal.open(6)
    jobs = [rehearsal.start(host) for host in hosts]
    rehearsal.wait_for_step(6)
    rehearsal.wait_for_checkpoint(4)
    first = first_host(rehearsal, hosts)
    if fault == "full":
        filler = rehearsal.network.shared / "filler"
        with pytest.raises(OSError, match="No space"), open(filler, "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
    else:
        shared = network.folder / "shared"
        hosts[first].run("mount", "--bind", shared, shared)
        hosts[first].run("mount", "-o", "remount,bind,ro", shared)
    rehearsal.open(12)
    assert all(finish(*jobs))
    cause = "No space left on device" if fault == "full" else "Read-only file system"
    assert any(cause in line for line in jobs[first].messages()), jobs[first].messages()
    for job in jobs[:first] + jobs[first + 1 :]:
        (line,) = job.messages()
        assert f"rank 0 on {hosts[first].name} ended: " in line and cause in line, line
    if fault == "full":
        filler.unlink()
    else:
        hosts[first].run("umount", shared)
    jobs = [rehearsal.start(host) for host in hosts]
    assert finish(*jobs) == [0, 0, 0]
    assert any("going on from step" in line for job in jobs for line in job.messages())
    check_same(rehearsal, undisturbed)


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """Return a starter whose processes see a clock that is an hour ahead."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the library that shifts the clock")
    library = tmp_path_factory.mktemp("clock") / "shift.so"
    source = Path(__file__).with_name("shift.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    with Starter({"LD_PRELOAD": str(library), "SHIFT": "3600"}) as starter:
        yield starter


@everything
@pytest.mark.parametrize("host", HOSTS)
def test_a_clock_is_an_hour_ahead(rehearsal, network, undisturbed, ahead, host):
    """Shift the clock of a host, which torchrun has to be told to bear."""
    hosts = network.connected(*HOSTS)
    jobs = [rehearsal.start(one, *PATIENT, starter=ahead if one.name == host else None) for one in hosts]
    assert finish(*jobs) == [0, 0, 0]
    check_same(rehearsal, undisturbed)
