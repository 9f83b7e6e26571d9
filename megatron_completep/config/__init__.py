"""The configuration of a run.

`schema` holds the fields, `load` reads YAML and overrides, `check` holds the rules between fields,
and `derived` the values that follow from several of them.
"""

from megatron_completep.config.check import check_config, check_world
from megatron_completep.config.load import config_from_mapping, load_config, save_config
from megatron_completep.config.schema import Config

__all__ = [
    "Config",
    "check_config",
    "check_world",
    "config_from_mapping",
    "load_config",
    "save_config",
]
