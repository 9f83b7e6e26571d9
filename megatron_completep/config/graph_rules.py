"""What a step that is replayed as one CUDA graph cannot be (run/static_step.py)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_completep.config.derived import PACKED_BACKENDS
from megatron_completep.config.remedies import Problem
from megatron_completep.config.schema import Config

WHERE = "training.cuda_graph = true"
REMEDY = "training.cuda_graph = false"


def graph_problems(config: Config) -> Iterator[Problem]:
    """Settings under which a step reads the host, or is not the same from step to step."""
    if not config.training.cuda_graph:
        return
    ranks = config.parallel.pipeline_parallel_size
    tensor_ranks = config.parallel.tensor_parallel_size
    if ranks * tensor_ranks > 1:
        yield (
            f"{WHERE} captures the step of one process, but "
            f"parallel.tensor_parallel_size x pipeline_parallel_size = {tensor_ranks} x {ranks}. "
            f"Use 1 and 1, or {REMEDY}."
        )
    if config.training.overlap_update:
        yield (
            f"{WHERE} captures a step that ends with its update, but training.overlap_update = "
            f"true lets that run under the next step. Use overlap_update = false, or {REMEDY}."
        )
    if config.training.batch_ramp is not None:
        yield (
            f"{WHERE} replays steps of one size, but training.batch_ramp changes the number of "
            f"micro-batches. Use batch_ramp = null, or {REMEDY}."
        )
    if config.model.position == "alibi":
        yield (
            f"{WHERE} cannot copy from the host in a step, as model.position = alibi does with "
            f"its slopes. Use another position, or {REMEDY}."
        )
    if config.optimizer.type == "muon":
        yield (
            f"{WHERE} has not been tried with optimizer.type = muon. Use optimizer.type = adamw, "
            f"or {REMEDY}."
        )
    backend = config.model.attention_backend
    # They take the boundaries of documents, which SDPA takes as a bias of one shape.
    takes_boundaries = backend.startswith("flash_attention") or backend in PACKED_BACKENDS
    if takes_boundaries and config.data.reset_at_document_ends:
        yield (
            f"{WHERE} does not go with model.attention_backend = {backend} and "
            "data.reset_at_document_ends = true: the number of documents, a shape, changes with "
            f"every micro-batch. Use model.attention_backend = sdpa, or {REMEDY}."
        )


def graph_world_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """A graph holds no communication with other processes."""
    if config.training.cuda_graph and world_size > 1:
        yield (
            f"{WHERE} captures the step of one process, but there are {world_size}. "
            f"Start one, or use {REMEDY}."
        )
