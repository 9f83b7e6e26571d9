"""The table for models of other trainers: any torch module, any torch optimizer."""

from megatron_completep.anywhere.coordinates import check_coordinates
from megatron_completep.anywhere.declared import declare, table_between
from megatron_completep.anywhere.groups import initialize_, param_groups
from megatron_completep.anywhere.muon import MuonGroups, muon_param_groups
from megatron_completep.anywhere.proposal import Proposal, propose_roles
from megatron_completep.anywhere.residual_norm import ResidualNorm

__all__ = [
    "MuonGroups",
    "Proposal",
    "ResidualNorm",
    "check_coordinates",
    "declare",
    "initialize_",
    "muon_param_groups",
    "param_groups",
    "propose_roles",
    "table_between",
]
