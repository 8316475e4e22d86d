"""Machines rehearsed on one: network, mount, host-name and process namespaces, joined by a bridge.

Nothing has a name outside its namespaces, so that any number of networks may exist at once, and each namespace ends
with its first process, a `cat` whose input the test holds: nothing outlives the test, however it ends.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ADDRESSES = {name: f"10.77.0.{number}" for number, name in enumerate(("alpha", "beta", "gamma", "delta"), 1)}


def call(*command: object) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def wait(ready: Callable[[], object], what: str, seconds: float) -> None:
    """Wait until something is so; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


class Machine:
    """A host, with what it has of a kernel to itself."""

    def __init__(self, network: "Network", name: str) -> None:
        self.network, self.name, self.address = network, name, ADDRESSES[name]
        self.relay: subprocess.Popen | None = None
        inside = ("nsenter", "-t", str(network.pid), "-m")
        fresh = ("unshare", "-n", "-m", "-u", "-p", "-f", "--kill-child", "--mount-proc", "cat")
        self.holder = subprocess.Popen([*inside, *fresh], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")

        def is_up() -> bool:
            found = children.read_text().split()
            return bool(found) and Path(f"/proc/{found[0]}/cmdline").read_bytes() == b"cat\0"

        wait(is_up, f"namespaces of {name}", 30)
        self.pid = int(children.read_text())
        self.run("hostname", name)
        for file in ("hosts", "nsswitch.conf"):
            self.run("mount", "--bind", network.folder / file, f"/etc/{file}")

    def run(self, *command: object) -> str:
        """Run a command on this machine."""
        return call("nsenter", "-t", self.pid, "-n", "-m", "-u", "-p", *command)

    def connect(self) -> None:
        """Connect the machine to the bridge by a pair of veth."""
        self.network.ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.pid)
        self.configure()

    def connect_through_relay(self, delay: float, loss: float) -> None:
        """Connect the machine by a relay that delays each packet by so many seconds and drops a share of them."""
        command = [
            sys.executable,
            str(HERE / "relay.py"),
            *map(str, (self.pid, self.network.pid, self.name, delay, loss)),
        ]
        self.relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.relay.stdout.readline() == "ready\n"
        self.configure()

    def configure(self) -> None:
        """Attach the other end of eth0, which has the machine's name, to the bridge, and give eth0 its address."""
        self.network.ip("link", "set", self.name, "master", "bridge", "up")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "link", "set", "lo", "up")

    def set_link(self, up: bool) -> None:
        """Plug the machine's cable in, or pull it."""
        self.network.ip("link", "set", self.name, "up" if up else "down")

    def cut_power(self) -> None:
        """End all processes of the machine; none of its connections says goodbye."""
        self.set_link(False)
        self.end()
        self.network.ip("link", "delete", self.name)

    def end(self) -> None:
        """End the machine: unshare ends its first process, and the kernel all others of its namespace."""
        self.holder.kill()
        self.holder.communicate()
        if self.relay is not None:
            self.relay.communicate()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class Network:
    """A bridge, the machines on it, and a folder that they share, a file system of its own.

    Args:
        folder: an empty folder for logs; the shared one is `folder / "shared"`.
        megabytes: size of the shared file system.

    Raises:
        OSError: namespaces can't be made here.
    """

    def __init__(self, folder: Path, megabytes: int = 64) -> None:
        self.folder, self.machines = folder, {}
        (folder / "shared").mkdir()
        lines = [f"{address} {name}" for name, address in ADDRESSES.items()]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        # no name server answers
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self.holder = subprocess.Popen(["unshare", "-n", "-m", "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pid = self.holder.pid
        try:
            command = Path(f"/proc/{self.pid}/cmdline")
            wait(lambda: command.read_bytes() == b"cat\0" or self.holder.poll() is not None, "namespaces", 30)
            if self.holder.poll() is not None:
                raise OSError(self.holder.stderr.read().decode().strip())
            self.run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "fastmim", folder / "shared")
            self.ip("link", "add", "bridge", "type", "bridge", "forward_delay", "0")
            self.ip("link", "set", "bridge", "up")
        except BaseException:
            self.close()
            raise

    @property
    def shared(self) -> Path:
        """Return the shared folder's path here; on the machines it is `folder / "shared"`."""
        return Path(f"/proc/{self.pid}/root{self.folder}/shared")

    def run(self, *command: object) -> str:
        return call("nsenter", "-t", self.pid, "-n", "-m", *command)

    def ip(self, *arguments: object) -> str:
        return self.run("ip", *arguments)

    def machine(self, name: str) -> Machine:
        """Return a new machine that is not connected yet."""
        self.machines[name] = Machine(self, name)
        return self.machines[name]

    def connected(self, *names: str) -> list[Machine]:
        """Return new machines."""
        found = [self.machine(name) for name in names]
        for one in found:
            one.connect()
        return found

    def close(self) -> None:
        for one in self.machines.values():
            one.end()
        self.holder.kill()
        self.holder.communicate()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Job:
    """torchrun on one machine."""

    def __init__(self, log: Path) -> None:
        self.log, self.status_file = log, Path(f"{log}.rc")

    @property
    def status(self) -> int | None:
        """Return torchrun's exit status; None while it runs."""
        text = self.status_file.read_text() if self.status_file.exists() else ""
        return int(text) if text else None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def messages(self) -> list[str]:
        """Return the lines of fastmim."""
        return [line for line in self.output.splitlines() if line.startswith("fastmim: ")]


class Starter:
    """A process that starts torchrun on machines without importing anything again; see starter.py.

    Args:
        environment: variables that are added, for all that it starts.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, str(HERE / "starter.py")], env=variables, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, machine: Machine, argv: list[str], gate: Path, log: Path) -> Job:
        """Start torchrun; its log is below the network's folder, which all machines see."""
        job = {"pid": machine.pid, "argv": argv, "log": str(log), "gate": str(gate)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Job(log)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
