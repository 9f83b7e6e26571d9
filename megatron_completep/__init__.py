"""Train CompleteP transformers at Megatron scale; start reading at `pretrain.py`.

The table is for models of other trainers too. These names load torch when they are first used:

    from megatron_completep import Table, Role, declare, initialize_, param_groups
    from megatron_completep import check_coordinates
"""

from importlib import import_module

# What typing's own constant is to type checkers, without the import: the package loads nothing.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from megatron_completep.anywhere import (
        ResidualNorm,
        check_coordinates,
        declare,
        initialize_,
        muon_param_groups,
        param_groups,
        propose_roles,
        table_between,
    )
    from megatron_completep.completep import Table
    from megatron_completep.roles import Role

__version__ = "0.1.0"

# Where each public name stands.
_ROOMS = {
    "Role": "roles",
    "Table": "completep",
    "ResidualNorm": "anywhere",
    "check_coordinates": "anywhere",
    "declare": "anywhere",
    "initialize_": "anywhere",
    "muon_param_groups": "anywhere",
    "param_groups": "anywhere",
    "propose_roles": "anywhere",
    "table_between": "anywhere",
}

__all__ = [
    "ResidualNorm",
    "Role",
    "Table",
    "__version__",
    "check_coordinates",
    "declare",
    "initialize_",
    "muon_param_groups",
    "param_groups",
    "propose_roles",
    "table_between",
]


def __getattr__(name: str) -> object:
    """A public name, imported when it is first asked for: the package itself loads nothing."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
