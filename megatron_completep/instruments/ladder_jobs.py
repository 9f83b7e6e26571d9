"""Files that run a ladder on a cluster: a Slurm array and an indexed Kubernetes job."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.config.yaml_text import dump_value
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.files import write_whole
from megatron_completep.instruments import sweep

_SLURM = """\
#!/bin/bash
# A ladder's runs, one a task:  sbatch {path}
# A task whose run is finished ends at once: the same command goes on with the missing ones.
#SBATCH --job-name=ladder
#SBATCH --array=0-{last}
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output={logs}
exec python -m megatron_completep.tools.ladder run {folder} --workers 1 \\
    --only "$SLURM_ARRAY_TASK_ID"
"""

_KUBERNETES = """\
# A ladder's runs, one a pod:  kubectl apply -f {path}
# {folder} must lie on the volume, under the same name. A pod whose run is finished ends at once.
apiVersion: batch/v1
kind: Job
metadata:
  name: ladder
spec:
  completionMode: Indexed
  completions: {count}
  parallelism: {parallel}
  backoffLimitPerIndex: 3
  template:
    spec:
      restartPolicy: Never
      containers:
        - name: run
          image: registry.example/megatron-completep:latest
          workingDir: /workspace
          command: [bash, -c]
          args: [{argument}]
          resources:
            limits: {{nvidia.com/gpu: 1}}
          volumeMounts:
            - {{name: shared, mountPath: /workspace}}
      volumes:
        - name: shared
          persistentVolumeClaim: {{claimName: training}}
"""
MOST_AT_ONCE = 8  # pods


def write(folder: Path, count: int) -> list[Path]:
    """Write jobs/ladder.sbatch and jobs/ladder.yaml for `count` runs; returns their paths.

    Raises DataError where they cannot be written.
    """
    jobs = folder / "jobs"
    slurm = jobs / "ladder.sbatch"
    kubernetes = jobs / "ladder.yaml"
    name = shlex.quote(str(folder))
    slurm_text = _SLURM.format(
        path=shlex.quote(str(slurm)),
        last=count - 1,
        # sbatch takes quotes off its own lines, as a shell does.
        logs=shlex.quote(str(jobs / "slurm-%A_%a.log")),
        folder=name,
    )
    command = (
        f"exec python -m megatron_completep.tools.ladder run {name} --workers 1 "
        '--only "$JOB_COMPLETION_INDEX"'
    )
    kubernetes_text = _KUBERNETES.format(
        path=shlex.quote(str(kubernetes)),
        folder=folder,
        count=count,
        parallel=min(count, MOST_AT_ONCE),
        argument=dump_value(command),
    )
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        write_whole(slurm, slurm_text.encode())
        write_whole(kubernetes, kubernetes_text.encode())
    except OSError as error:
        raise DataError(
            f"{jobs} cannot be written: {error.strerror}. Free some space, or move the ladder."
        ) from None
    return [slurm, kubernetes]


def run_number(points: Sequence[sweep.Point], number: int) -> sweep.Point:
    """The run of a task. Raises ConfigError for a number beyond the last one."""
    if number >= len(points):
        raise ConfigError(
            f"--only {number}: the ladder has {len(points)} runs, counted from 0. "
            "Write the jobs again with --write-jobs."
        )
    return points[number]
