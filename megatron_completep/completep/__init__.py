"""CompleteP: the paper's table, batch scaling, and both at the shape of a run."""

from megatron_completep.completep.parameterization import Factors, Table, table_of

__all__ = ["Factors", "Table", "table_of"]
