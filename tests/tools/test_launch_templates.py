"""The templates of configs/launch:
the batch script with a stand-in for Slurm, the Kubernetes objects as YAML.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path("configs/launch")
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "option $1 $SRUN_CPUS_PER_TASK" >> "$RECORD"; shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task SLURM_NTASKS_PER_NODE=2 "$@" &
    pids="$pids $!"
done
worst=0
for pid in $pids; do wait "$pid"; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
PYTHON = """#!/bin/bash
connections=$CUDA_DEVICE_MAX_CONNECTIONS
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $connections $#: $*" >> "$RECORD"
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "scontrol $*" >> "$RECORD"; fi
"""


@pytest.mark.parametrize(
    ("code", "requeued", "connections"),
    [(0, False, 1), (2, False, 8), (75, True, 1), (77, True, 1), (78, False, 1)],
)
def test_the_batch_script_starts_every_rank_and_requeues_what_may_go_on(
    tmp_path, code, requeued, connections
):
    for name, text in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    record = tmp_path / "record"
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "8"}
    environment = {
        **os.environ,
        **slurm,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(record),
        "CODE": str(code),
        "ENVIRONMENT": "",  # the machine's own Python
    }
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    if connections != 1:  # what the user has set stays
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = str(connections)
    script = [
        "bash",
        str(LAUNCH / "slurm.sbatch"),
        "run.yaml",
        "data.seed=1",
        "training.output_dir=a b",
    ]
    assert subprocess.run(script, env=environment, timeout=280).returncode == code
    lines = record.read_text().splitlines()
    program = "-m megatron_completep.pretrain run.yaml data.seed=1 training.output_dir=a b"
    options = [line for line in lines if line.startswith("option ")]
    assert options == [
        f"option --{name} 8" for name in ("kill-on-bad-exit=1", "cpu-bind=cores", "mem-bind=local")
    ]
    ranks = sorted(line for line in lines if not line.startswith(("scontrol", "option ")))
    assert ranks == [f"{rank} 2 {rank} 2 node7 {connections} 5: {program}" for rank in (0, 1)]
    assert [line for line in lines if line.startswith("scontrol")] == (
        ["scontrol requeue 4711"] if requeued else []
    )


def test_the_batch_script_activates_the_environment(tmp_path):
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("echo activated; exit 9")
    for name, environment in (("named", "venv"), ("by default", ".venv")):
        (tmp_path / ".venv").unlink(missing_ok=True)
        if name == "by default":
            (tmp_path / ".venv").symlink_to("venv")
        words = {"ENVIRONMENT": environment} if name == "named" else {}
        clean = {key: word for key, word in os.environ.items() if key != "ENVIRONMENT"}
        script = subprocess.run(
            ["bash", str((LAUNCH / "slurm.sbatch").resolve())],
            cwd=tmp_path,
            env={**clean, **words},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (script.returncode, script.stdout) == (9, "activated\n"), name


def test_the_batch_script_refuses_an_environment_that_is_not_there(tmp_path):
    script = subprocess.run(
        ["bash", str((LAUNCH / "slurm.sbatch").resolve())],
        cwd=tmp_path,
        env={**os.environ, "ENVIRONMENT": "typo"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert script.returncode == 2 and "ENVIRONMENT=typo has no bin/activate" in script.stderr


def node_and_job(name: str) -> tuple[dict, dict, int]:
    """(the pod, the container with its command, the number of nodes) of a template."""
    objects = list(yaml.safe_load_all((LAUNCH / f"{name}.yaml").read_text()))
    spec = objects[0]["spec"]
    if name == "pytorchjob":
        worker = spec["pytorchReplicaSpecs"]["Worker"]
        pod, nodes = worker["template"]["spec"], worker["replicas"]
        return pod, pod["containers"][0], nodes
    if name == "trainjob":
        runtime, job = spec, objects[1]["spec"]
        assert job["runtimeRef"]["name"] == objects[0]["metadata"]["name"]
        assert job["trainer"]["numNodes"] == runtime["mlPolicy"]["numNodes"]
        pod = runtime["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
            "spec"
        ]
        trainer = job["trainer"]
        return pod, {**trainer, "resources": trainer["resourcesPerNode"]}, trainer["numNodes"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    return pod, pod["containers"][0], job["completions"]


@pytest.mark.parametrize("name", ["jobset", "pytorchjob", "trainjob"])
def test_the_kubernetes_objects_run_the_trainer_with_time_to_save(name):
    pod, container, nodes = node_and_job(name)
    words = " ".join([*container["command"], *container.get("args", [])]).replace("=", " ")
    assert nodes == 8
    assert "torchrun" in words
    assert "-m megatron_completep.pretrain configs/completep_1b.yaml" in words
    assert pod["terminationGracePeriodSeconds"] > 600 and "--shutdown-timeout 600" in words
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["requests"]["cpu"]
    assert {"name": "CUDA_DEVICE_MAX_CONNECTIONS", "value": "1"} in container["env"]
    (memory,) = (volume for volume in pod["volumes"] if volume["name"] == "memory")
    assert memory["emptyDir"]["medium"] == "Memory"
    assert pod["containers"][0]["image"] == "registry.example/megatron-completep:latest"


def test_the_image_is_made_of_what_a_checkout_has():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    pinned = Path("constraints.txt").read_text()
    (torch,) = (line.removeprefix("ARG TORCH=") for line in lines if line.startswith("ARG TORCH="))
    assert f"torch=={torch}" in pinned
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    needed = {"megatron_completep", "kernels", "tools", "configs", "setup.py", "README.md"}
    assert needed & set(ignored) == set()
