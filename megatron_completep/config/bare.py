"""A configuration for a model that is built, measured or replayed without a run's files."""

from __future__ import annotations

from typing import Any

from megatron_completep.config.schema import Config, ModelConfig, OptimizerConfig


def bare_config(model: ModelConfig, **sections: Any) -> Config:
    """The configuration of a run of this model that opens no file and writes none.

    sections: further sections of `Config`, as models or mappings; of `training` the fields that
    differ. Fields are checked; the rules between them are not, as those are for what users write.
    """
    training = {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "train_steps": 1,
        "output_dir": "none",
        **sections.pop("training", {}),
    }
    required = {
        "optimizer": OptimizerConfig(base_lr=1e-3),
        "data": {"train": [{"prefix": "none"}]},
    }
    # The later of two equal keys counts: a section that was handed in replaces the required one.
    settings = {**required, "training": training, **sections}
    return Config(model=model, **settings)
