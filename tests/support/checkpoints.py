"""A run of a few thousand parameters, and ways to train, save and load it."""

from __future__ import annotations

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
from megatron_completep.optim.schedule import learning_rate
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.state import RunState

BATCH, SEQ, VOCAB = 4, 8, 61  # a vocabulary that needs padding at every tensor size


def tiny_config(folder: Path | str, **overrides: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 24,
            "vocab_size": VOCAB,
            "vocab_multiple": 8,
            "seq_length": SEQ,
        },
        "completep": {"base_hidden_size": 8, "base_num_layers": 1},
        "optimizer": {"base_lr": 1e-2, "warmup_steps": 2},
        "data": {"train": [{"prefix": "none"}]},
        "training": {
            "micro_batch_size": 2,
            "global_batch_size": BATCH,
            "train_steps": 10,
            "precision": "float32",
            "device": "cpu",
            "output_dir": str(folder),
        },
        "checkpoint": {"async_save": False},
    }
    for section, value in overrides.items():
        values[section] = {**values.get(section, {}), **value}
    return Config.model_validate(values)


class TinyRun:
    """Model, optimizer and checkpointer of one rank; `train` makes steps whose data depends on the step alone."""

    def __init__(
        self,
        config: Config,
        context: ParallelContext | None = None,
        fail_point=no_fail_point,
        rule=None,
        **options: Any,
    ):
        self.config, self.context = config, context or ParallelContext.single("cpu")
        precision = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}[
            config.training.precision
        ]
        table = table_of(config)
        self.model = GPT(config.model, table, self.context)
        initialize(self.model, table, config.optimizer, config.training.seed)
        if precision == torch.float64:
            self.model.double()
        self.optimizer = DistributedOptimizer(
            [self.model], table, config.optimizer, self.context, config.parallel, precision, rule
        )
        self.said: list[str] = []
        options.setdefault("report", self.said.append)
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
                0, self.config.model.vocab_size, (BATCH, SEQ + 1), generator=generator
            )
            rows = tokens.chunk(self.context.data.size)[self.context.data.rank]
            self.optimizer.begin_step(1)
            self.optimizer.wait_for_parameters()
            loss = self.model(rows[:, :-1], labels=rows[:, 1:])
            loss.backward()
            rate = learning_rate(step, self.config.optimizer, self.config.training.train_steps)
            losses.append(
                self.optimizer.step(rate, loss, torch.tensor(rows[:, 1:].numel())).loss.item()
            )
            self.state = self.state.after_step(BATCH, SEQ)
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
        flats = {"flat": self.optimizer.shards.flat, **self.optimizer.states}
        return {
            name: flat.contiguous().view(torch.uint8).numpy().tobytes()
            for name, flat in flats.items()
        } | {"updates": repr(read_control(self.optimizer.control).step).encode()}
