"""The batch script for SLURM, run with a srun and a scontrol of the test's own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLUSTERS = Path(__file__).parents[2] / "examples" / "clusters"

# starts the tasks, passes SIGUSR1 on to each, and returns the first bad status, as srun does
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = [
    subprocess.Popen(sys.argv[2:], env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
open(os.environ["SRUN_PID"], "w").write(str(os.getpid()))
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
status = 0
for task in tasks:
    # a task that was ended by a signal has the status that shells give it
    ended = task.wait()
    status = status or (ended if ended >= 0 else 128 - ended)
sys.exit(status)
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>"$REQUEUED"; fi
"""


@pytest.fixture
def job(tmp_path):
    """Return a function that starts the job of a small run, and the file that lists what was requeued."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "photos").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        # a link to the interpreter doesn't find the packages of its environment
        "PYTHONPATH": os.pathsep.join([str(CLUSTERS.parents[1]), *filter(None, sys.path)]),
        "REQUEUED": str(tmp_path / "requeued"),
        "SRUN_PID": str(tmp_path / "srun"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
    }

    def start(steps: int) -> subprocess.Popen:
        settings = [
            f"data={tmp_path / 'photos'}",
            f"output_dir={tmp_path / 'run'}",
            f"max_steps={steps}",
            "image_size=16",
            "batch_size=4",
            "num_threads=1",
            "device=cpu",
            "log_every=1",
            "model_options={patch_size=4, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=12, decoder_depth=1}",
        ]
        return subprocess.Popen(
            ["bash", str(CLUSTERS / "slurm.sbatch"), "quickstart_cpu", *settings],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start, tmp_path / "requeued"


def test_a_slurm_job_is_requeued_until_the_run_is_finished(job, tmp_path):
    start, requeued = job
    running = start(10**6)
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()):
            assert running.poll() is None and time.monotonic() < deadline, running.stderr.read()
            time.sleep(0.1)
        # SLURM signals the tasks, not the script
        os.kill(int((tmp_path / "srun").read_text()), signal.SIGUSR1)
        _, printed = running.communicate(timeout=120)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 128 + signal.SIGUSR1, printed
    assert "is saved; the same command goes on from there" in printed
    assert requeued.read_text() == f"requeue {os.getpid()}\n"
    saved = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))

    again = start(saved + 2)
    _, printed = again.communicate(timeout=120)
    assert again.returncode == 0, printed
    assert f"going on from step {saved}" in printed and f"finished: step {saved + 2}" in printed
    assert requeued.read_text().count("\n") == 1


SSH = """#!/bin/bash
[ "$1 $2 $3" = "-tt -o BatchMode=yes" ] || exit 9
echo "$4: $(bash -c "$5")" >>"$STARTED"
"""


def test_the_ssh_script_starts_torchrun_on_each_machine(tmp_path):
    folder = tmp_path / "a folder"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for path, text in (
        (tmp_path / "ssh", SSH),
        (folder / ".venv" / "bin" / "torchrun", '#!/bin/bash\nprintf "%s|" "$@"'),
    ):
        path.write_text(text)
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "4"}
    environment["STARTED"] = str(tmp_path / "started")
    command = ["bash", str(CLUSTERS / "ssh.sh"), "one two", "quickstart_cpu", "data=it's here"]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=60)
    lines = sorted((tmp_path / "started").read_text().splitlines())
    assert [line.split(":")[0] for line in lines] == ["one", "two"]
    for line in lines:
        assert "--nnodes=2|--nproc-per-node=4|" in line and "--rdzv-endpoint=one:29400|" in line
        assert line.endswith("-m|fastmim|pretrain|quickstart_cpu|data=it's here|")


def test_scripts_say_how_they_are_called():
    for script in ("slurm.sbatch", "ssh.sh"):
        done = subprocess.run(["bash", str(CLUSTERS / script)], capture_output=True, text=True)
        assert done.returncode == 2 and "usage:" in done.stderr and "CONFIG" in done.stderr
