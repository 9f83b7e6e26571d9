"""Runs whose overrides name parameters that some ranks do not hold,
and whose embeddings are one parameter on two stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.config import Config
from megatron_completep.errors import ConfigError, UserError
from megatron_completep.guards import hooks
from megatron_completep.guards.replicas import replica_hashes
from megatron_completep.pretrain import pretrain
from megatron_completep.run.state import ExitCode
from tests.support.ranks import launched_as
from tests.support.runs import rows_of, tiny_config

SHORT = (
    "training.train_steps=4",
    "training.validation_interval=null",
    "checkpoint.interval=null",
    "guards.hang_timeout_minutes=null",
)
PIPELINE = ("parallel.pipeline_parallel_size=2",)
VIRTUAL = (
    *PIPELINE,
    "parallel.virtual_pipeline_size=2",
    "parallel.schedule=interleaved_1f1b",
    "model.num_layers=4",
)
TIED = ("model.tied_embeddings=true",)


def as_rank(rank: int, world_size: int, config: Config, broken: str = "") -> int | str:
    """A run's exit code, or what it is refused with."""
    launched_as(rank, world_size)
    if broken and rank == world_size - 1:
        hooks.replica_hashes = with_a_moved_end
    try:
        return int(pretrain(config))
    except UserError as error:
        return str(error)
    finally:
        hooks.replica_hashes = replica_hashes


def with_a_moved_end(optimizer: Any, context: Any) -> Any:
    """One bit of this end's tied embedding is another, in masters and weights alike:
    nothing but the other end can tell.
    """
    optimizer.wait_for_parameters()
    words = optimizer.shards.parameters["unembedding.weight"].detach().view(torch.int64)
    words.view(-1)[3] ^= 1
    return replica_hashes(optimizer, context)


def overrides(*entries: str) -> str:
    return f"optimizer.overrides=[{', '.join(f'{{{entry}}}' for entry in entries)}]"


CASES = {
    "a layer of the first stage": ((*PIPELINE,), overrides("pattern: 'layers.0.*', lr: 0.5")),
    "a layer of the last stage": (
        (*PIPELINE,),
        overrides("pattern: 'layers.1.mlp.*', lr: 0.5, weight_decay: 3.0, eps: 2.0"),
    ),
    "the unembedding": (
        (*PIPELINE,),
        overrides("pattern: 'unembedding.*', lr: 2.0, init_std: 0.5"),
    ),
    "a tied embedding and the final norm": (
        (*PIPELINE, *TIED),
        overrides("pattern: '[ef]*', lr: 3.0"),
    ),
    "a tied embedding alone": (
        (*PIPELINE, *TIED),
        overrides("pattern: 'embedding.weight', lr: 3.0, weight_decay: 0.0, init_std: 2.0"),
    ),
    "one of four virtual stages": (
        (*VIRTUAL, *TIED),
        overrides("pattern: 'layers.2.*', lr: 0.25", "pattern: 'e*', eps: 4.0"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_overrides_of_what_one_stage_holds_train_as_in_one_process(
    tmp_path: Path, pool: Any, case: str
) -> None:
    layout, named = CASES[case]
    shape = tuple(word for word in layout if word.startswith("model."))
    runs = {
        "stages": tiny_config(
            tmp_path, *SHORT, *layout, named, "guards.replica_check_interval=1", output="stages"
        ),
        "alone": tiny_config(tmp_path, *SHORT, *shape, named, output="alone"),
        "plain": tiny_config(tmp_path, *SHORT, *shape, output="plain"),
    }
    assert pool.run(2, as_rank, 2, runs["stages"]) == [0, 0]
    assert [pretrain(runs[name]) for name in ("alone", "plain")] == [ExitCode.DONE] * 2
    losses = {name: [row["loss"] for row in rows_of(config)] for name, config in runs.items()}
    torch.testing.assert_close(losses["stages"], losses["alone"], rtol=1e-10, atol=0)
    # The override does something.
    assert max(abs(a - b) for a, b in zip(losses["alone"], losses["plain"], strict=True)) > 1e-6


@pytest.mark.parametrize(
    "word",
    [
        overrides("pattern: 'layers.2.*', lr: 0.5"),
        "optimizer.base_eps=1e-320",
        "completep.factors.final_norm.init_std=2.0",  # of the last stage alone
    ],
)
def test_every_rank_refuses_alike_and_as_one_process_does(
    tmp_path: Path, pool: Any, word: str
) -> None:
    config = tiny_config(tmp_path, *SHORT, *PIPELINE, word)
    with pytest.raises(ConfigError) as alone:
        pretrain(tiny_config(tmp_path, *SHORT, word))
    assert pool.run(2, as_rank, 2, config) == [str(alone.value)] * 2
    assert not Path(config.training.output_dir).exists()  # before anything is made


def test_a_factor_that_reaches_nothing_is_said_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny_config(tmp_path, *SHORT, "completep.factors.qk_norm.lr=2.0"))
    assert (
        "warning: completep.factors.qk_norm reaches no parameter of this model"
        in capsys.readouterr().out
    )


def test_ends_of_a_tied_embedding_that_differ_end_the_run(tmp_path: Path, pool: Any) -> None:
    config = tiny_config(tmp_path, *SHORT, *PIPELINE, *TIED, "guards.replica_check_interval=2")
    said = pool.run(2, as_rank, 2, config, "moved")
    assert said[0] == said[1]
    assert (
        "step 2: replicas differ: rank 0, 1 in tied embedding of tensor 0, slice 0 (one of them)"
        in str(said[0])
    )
