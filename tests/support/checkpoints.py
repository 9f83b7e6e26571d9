"""A run of a few thousand parameters, and ways to train, save and load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_completep.checkpoint import Checkpointer
from megatron_completep.checkpoint.checkpointer import no_fail_point
from megatron_completep.completep import table_of
from megatron_completep.config.schema import Config
from megatron_completep.kernels import read_control
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.rule import Rule
from megatron_completep.optim.schedule import learning_rate
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.precision import DTYPES
from megatron_completep.run.state import RunState
from tests.support.configs import merged, small_config

BATCH = 4
SEQ_LENGTH = 8
CHECKPOINTED: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 16,
        "num_layers": 2,
        "ffn_hidden_size": 24,
        "vocab_size": 61,  # needs padding at every tensor size
        "seq_length": SEQ_LENGTH,
    },
    "completep": {"base_hidden_size": 8, "base_num_layers": 1},
    "optimizer": {"warmup_steps": 2},
    "training": {"global_batch_size": BATCH},
    "checkpoint": {"async_save": False},
}


def checkpointed_config(folder: Path | str, **sections: Mapping[str, Any]) -> Config:
    """The configuration of a `TinyRun` that saves in `folder`."""
    output = {"training": {"output_dir": str(folder)}}
    return small_config(**merged(CHECKPOINTED, output, sections))


class TinyRun:
    """Model, optimizer and checkpointer of one rank; the data of a step depend on the step alone.

    messages: what the checkpointer reported.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext | None = None,
        fail_point: Callable[[str], None] = no_fail_point,
        rule: type[Rule] | None = None,
        **options: Any,
    ):
        self.config = config
        self.context = context or ParallelContext.single("cpu")
        precision = DTYPES[config.training.precision]
        table = table_of(config)
        self.model = GPT(config.model, table, self.context)
        initialize(self.model, table, config.optimizer, config.training.seed)
        if precision == torch.float64:
            self.model.double()
        self.optimizer = DistributedOptimizer(
            [self.model], table, config.optimizer, self.context, config.parallel, precision, rule
        )
        self.messages: list[str] = []
        options.setdefault("report", self.messages.append)
        self.checkpointer = Checkpointer(
            config, self.context, self.optimizer, table, fail_point=fail_point, **options
        )
        self.state = RunState()

    def train(self, steps: int) -> list[float]:
        """The losses of the next steps."""
        losses = []
        for _ in range(steps):
            step = self.state.step + 1
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(
                0, self.config.model.vocab_size, (BATCH, SEQ_LENGTH + 1), generator=generator
            )
            rows = tokens.chunk(self.context.data.size)[self.context.data.rank]
            self.optimizer.begin_step(1)
            self.optimizer.wait_for_parameters()
            loss = self.model(rows[:, :-1], labels=rows[:, 1:])
            loss.backward()
            rate = learning_rate(step, self.config.optimizer, self.config.training.train_steps)
            result = self.optimizer.step(rate, loss, torch.tensor(rows[:, 1:].numel()))
            losses.append(result.loss.item())
            self.state = self.state.after_step(BATCH, SEQ_LENGTH)
        self.optimizer.wait_for_parameters()
        return losses

    def save(self) -> None:
        self.checkpointer.save(self.state)

    def resume(self) -> bool:
        state = self.checkpointer.load_latest()
        self.state = state or self.state
        return state is not None

    def bits(self) -> dict[str, bytes]:
        """Every number that training depends on."""
        bits = {"updates": repr(read_control(self.optimizer.control).step).encode()}
        for name, flat in {"flat": self.optimizer.shards.flat, **self.optimizer.states}.items():
            bits[name] = flat.contiguous().view(torch.uint8).numpy().tobytes()
        return bits
