"""Whether a device multiplies bf16 in hardware."""

from __future__ import annotations

import torch


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products run in hardware.

    They do on CUDA from compute capability 8.0 on and on CPUs with AMX or AVX512-BF16. Other CPUs
    emulate bf16, slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        # Private functions of torch: a version without one is taken to have no such units.
        probe = getattr(torch.cpu, name, None)
        if probe is not None and probe():
            return True
    return False
