"""Launch parameters: a pure function of shape, dtype and architecture, from the tables below.

Nothing is tuned at run time, so every rank and every restart launches the same reduction order and gets the same bits.
An architecture is a string: "sm_90", "gfx942", or "interpreter" for CPU tensors under Triton's interpreter.
"""

import functools

import torch


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like, "gfx942" and the like, or "interpreter" for anything that is not a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def partial_rows(device: torch.device, dtype: torch.dtype, hidden: int) -> int:
    """P of the partial sums [P, K, H] that a norm's backward returns on `device`; 1 where torch's own operators run."""
    return 1
