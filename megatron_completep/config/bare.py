"""A configuration for a model that is built, measured or replayed without a run's files."""

from __future__ import annotations

from typing import Any

from megatron_completep.config.schema import Config, ModelConfig, OptimizerConfig


def bare_config(model: ModelConfig, **sections: Any) -> Config:
    """The configuration of a run of this model that opens no file and writes none.

    sections: further sections of `Config`, as models or mappings; of `training` the fields that differ. Fields are checked, the
    rules between them are not: those are for what a user wrote.
    """
    training = {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "train_steps": 1,
        "output_dir": "none",
        **sections.pop("training", {}),
    }
    defaults = {
        "optimizer": OptimizerConfig(base_lr=1e-3),
        "data": {"train": [{"prefix": "none"}]},
    }
    return Config(model=model, **{**defaults, "training": training, **sections})
