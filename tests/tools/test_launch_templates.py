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
shift  # --kill-on-bad-exit=1
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
    ranks = sorted(line for line in lines if not line.startswith("scontrol"))
    assert ranks == [f"{rank} 2 {rank} 2 node7 {connections} 5: {program}" for rank in (0, 1)]
    assert [line for line in lines if line.startswith("scontrol")] == (
        ["scontrol requeue 4711"] if requeued else []
    )


def test_the_kubernetes_objects_run_the_trainer_with_time_to_save():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    operator = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())["spec"][
        "pytorchReplicaSpecs"
    ]["Worker"]
    assert job["parallelism"] == job["completions"] == operator["replicas"] == 8
    for pod in (job["template"]["spec"], operator["template"]["spec"]):
        container = pod["containers"][0]
        words = " ".join([*container["command"], *container.get("args", [])]).replace("=", " ")
        assert "torchrun" in words
        assert "-m megatron_completep.pretrain configs/completep_1b.yaml" in words
        assert pod["terminationGracePeriodSeconds"] > 600 and "--shutdown-timeout 600" in words
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert {"name": "CUDA_DEVICE_MAX_CONNECTIONS", "value": "1"} in container["env"]
