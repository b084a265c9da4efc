"""The script for Slurm, run here with an `srun` that runs what it is told on this machine."""

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm.sh"

SRUN = """#!/usr/bin/env bash
# Slurm's srun, for nodes that are all this machine.
nodes=()
while [[ $1 == --* ]]; do nodes+=("$1"); shift; done
echo "srun ${nodes[*]} $*" >> "$NOTED"
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$NOTED"
[[ $1 == show ]] && tr , '\\n' <<< "$3"
exit 0
"""
RAY = """#!/usr/bin/env bash
# Instead of Ray: a head or a node is a process that waits, and says when it ends.
what=$([[ $* == *--head* ]] && echo head || echo node)
[[ $1 == health-check ]] && exit 0
[[ -n ${RAY_AUTH_TOKEN_PATH:-} && $RAY_AUTH_MODE == token ]] || exit 1
stat -c '%a %s' "$RAY_AUTH_TOKEN_PATH" "$(dirname "$RAY_AUTH_TOKEN_PATH")" >> "$NOTED"
trap 'echo "$what ends" >> "$NOTED"; kill $!; exit' TERM
echo "$what starts" >> "$NOTED"
sleep 600 & wait
"""
PYTHON = """#!/usr/bin/env bash
# Instead of Python, which is asked to wait until so many nodes have joined.
echo "python $*" >> "$NOTED"
until (($(grep -c " starts$" "$NOTED") >= $2)); do sleep 0.02; done
"""


@dataclass
class Slurm:
    """A machine with Slurm's commands, where a job may be started."""

    directory: Path
    variables: dict[str, str]

    @property
    def noted(self) -> list[str]:
        """What the commands were told, in order."""
        return (self.directory / "noted").read_text().splitlines()

    def put(self, name: str, text: str) -> None:
        file = self.directory / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            [SCRIPT, *command],
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str) -> tuple[int, str, str]:
        """Exit status, output and errors of a job."""
        started = self.start(*command)
        out, err = started.communicate(timeout=240)
        return started.returncode, out, err

    def wait_for(self, *lines: str) -> None:
        deadline = time.monotonic() + 60
        while not {*lines} <= {*self.noted}:
            assert time.monotonic() < deadline, self.noted
            time.sleep(0.05)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    (tmp_path / "bin").mkdir()
    (tmp_path / "noted").touch()
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))
    }
    variables |= {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "NOTED": str(tmp_path / "noted"),
        "MMRAG_RUNS": str(tmp_path / "runs"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost,127.0.0.1",
        "SLURM_SUBMIT_DIR": str(tmp_path),  # without a .venv
    }
    made = Slurm(tmp_path, variables)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "python": PYTHON}.items():
        made.put(name, text)
    return made


def test_bash_understands_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


def test_a_command_runs_in_a_cluster_that_ends_in_order(slurm):
    status, _, err = slurm.run("sh", "-c", 'echo "runs in $RAY_ADDRESS $1" >> "$NOTED"', "-", "a b")
    assert status == 0, err
    port = 20000 + 4 * (int(slurm.variables["SLURM_JOB_ID"]) % 4000)
    events = [line for line in slurm.noted if re.match(r"head|node|runs", line)]
    assert sorted(events[:2]) == ["head starts", "node starts"]
    assert events[2:] == [f"runs in 127.0.0.1:{port} a b", "node ends", "head ends"]
    [head, workers] = [line for line in slurm.noted if line.startswith("srun")]
    assert "--nodes=1 --ntasks=1 --nodelist=localhost ray start --head --block" in head
    assert f"--port={port} " in head
    assert "--exclude=localhost ray start --block --disable-usage-stats --address=127" in workers
    assert any(line.startswith("python - 2 ") for line in slurm.noted)


def test_the_token_is_its_owners_alone_and_gone_afterwards(slurm):
    slurm.run("true")
    assert "600 64" in slurm.noted and any(line.startswith("700 ") for line in slurm.noted)
    assert list((slurm.directory / "runs" / ".slurm").iterdir()) == []
    shown = " ".join(slurm.noted)
    assert not re.search(r"[0-9a-f]{64}", shown)


def test_a_job_of_one_node_starts_no_others(slurm):
    slurm.variables["SLURM_JOB_NODELIST"] = "localhost"
    status, _, err = slurm.run("true")
    assert status == 0, err
    assert [line for line in slurm.noted if line.startswith("node")] == []


def test_a_command_that_fails_is_the_jobs_failure_and_is_not_tried_again(slurm):
    status, _, _ = slurm.run("sh", "-c", "exit 7")
    assert status == 7
    assert slurm.noted[-1] == "head ends"


def test_a_command_that_is_out_of_time_is_told_to_end_and_queued_again(slurm):
    program = 'sleep 60 & trap "kill $!; echo told >> $NOTED; exit 143" TERM; echo begins >> $NOTED'
    job = slurm.start("bash", "-c", f"{program}; wait")
    slurm.wait_for("begins", "node starts")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 143
    order = [
        "told",
        "node ends",
        "head ends",
        f"scontrol requeue {slurm.variables['SLURM_JOB_ID']}",
    ]
    assert slurm.noted[-4:] == order


def test_a_job_that_is_cancelled_is_not_queued_again(slurm):
    job = slurm.start("bash", "-c", "echo begins >> $NOTED; exec sleep 60")
    slurm.wait_for("begins", "node starts")
    job.terminate()
    job.communicate(timeout=60)
    assert job.returncode == 143
    assert slurm.noted[-2:] == ["node ends", "head ends"]


def test_a_head_that_does_not_start_is_said_at_once(slurm):
    slurm.put("ray", "#!/bin/sh\nexit 1\n")
    status, _, err = slurm.run("true")
    assert status == 1 and "the head did not start" in err


@pytest.mark.parametrize(
    ("changes", "command", "said"),
    [
        ({}, (), "no command given"),
        ({"SLURM_JOB_ID": ""}, ("true",), "submit it with sbatch"),
        ({"MMRAG_RUNS": ""}, ("true",), "MMRAG_RUNS names no directory"),
        ({"SLURM_JOB_NODELIST": "no-such-node.invalid"}, ("true",), "has no address"),
    ],
)
def test_what_is_missing_is_named(slurm, changes, command, said):
    slurm.variables |= changes
    status, _, err = slurm.run(*command)
    assert status == 1 and said in err
    assert len(err.splitlines()) == 1


def test_what_it_asks_slurm_for_is_what_an_experiment_takes_of_a_node():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SCRIPT.read_text(), re.MULTILINE))
    assert asked["gpus-per-node"] == "8" and asked["ntasks-per-node"] == "1"
    for name in ("330m", "6.8b"):
        file = ROOT / "jobs" / "configs" / f"{name}.yaml"
        workers = yaml.safe_load(file.read_text())["train"]["workers"]
        assert 8 * workers["num_cpus"] <= int(asked["cpus-per-task"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_runs_on_two_nodes_with_a_token(slurm):
    """With Ray itself: both nodes are this machine."""
    for name in ("ray", "python"):
        (slurm.directory / "bin" / name).unlink()
    (slurm.directory / ".venv").symlink_to(ROOT / ".venv")
    program = (
        "import os, ray; ray.init(log_to_driver=False);"
        "print('alive', sum(n['Alive'] for n in ray.nodes()));"
        "print('sum', sum(ray.get([ray.remote(lambda n: n * n).remote(n) for n in range(4)])));"
        "print('asks', os.environ['RAY_AUTH_MODE'])"
    )
    status, out, err = slurm.run("python", "-c", program)
    assert status == 0, err[-3000:]
    assert {"alive 2", "sum 14", "asks token"} <= set(out.splitlines())
    session = f"/tmp/ray-{slurm.variables['SLURM_JOB_ID']}"
    left = [
        one.info["name"]
        for one in psutil.process_iter(["name", "cmdline"])
        if any(session in word for word in one.info["cmdline"] or ())
    ]
    assert left == []
    shutil.rmtree(session, ignore_errors=True)
