"""Which of torch's attention kernels a call may take on a GPU: a pure function of what is known.

torch's own order on Hopper begins with cuDNN, the fastest there. It must not be taken

- with a mask while a length is 64 beyond a multiple of 128: its backward has returned NaN
  (pytorch issue 196678);
- where lengths change from call to call, as in generation: it makes a plan for each new shape.

FlashAttention takes no mask. The memory-efficient kernel takes no grouped queries, so that keys and
values get a copy for each query head where it may be the one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch.nn.attention import SDPBackend

CUDNN = SDPBackend.CUDNN_ATTENTION
FLASH = SDPBackend.FLASH_ATTENTION
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION
MATH = SDPBackend.MATH  # plain products: takes everything, and holds all scores

WITHOUT_PLANS = (FLASH, EFFICIENT, MATH)

# What a setting of model.attention_backend asks for by name.
NAMED = {
    "cudnn": CUDNN,
    "flash": FLASH,
    "flash_attention_3": FLASH,  # which the package replaces, see flash.py
    "efficient": EFFICIENT,
    "varlen": FLASH,  # without documents; with them see flash.py
}


class AttentionCall(NamedTuple):
    """What the choice of a kernel follows from."""

    device_type: str
    queries: int  # their number in a sequence, S
    keys: int
    masked: bool  # a bias on the logits is passed
    grouped: bool  # fewer heads of keys and values than of queries
    trains: bool  # gradients are recorded; otherwise lengths may change from call to call
    cached: bool = False  # keys and values of earlier calls come first


class KernelChoice(NamedTuple):
    """kernels: what torch may take, best first; empty: as torch chooses.

    expand: each query head needs its own keys and values.
    """

    kernels: tuple[SDPBackend, ...] = ()
    expand: bool = False


def choose_kernels(backend: str, call: AttentionCall) -> KernelChoice:
    """The kernels of one call under a setting of model.attention_backend.

    A kernel that is asked for by name is the only one in training, so that what torch does not have
    is an error there. Elsewhere others may take its place.
    """
    if call.device_type != "cuda" or backend == "sdpa":
        return KernelChoice()
    named = NAMED.get(backend)
    if call.masked:
        return _masked(named, call)
    kernels: tuple[SDPBackend, ...]
    if call.trains and not call.cached:
        kernels = () if named is None else (named,)
    elif named is None or (named is CUDNN and call.cached):
        kernels = WITHOUT_PLANS
    else:
        kernels = (named, *(kernel for kernel in WITHOUT_PLANS if kernel is not named))
    return KernelChoice(kernels, expand=call.grouped and named is EFFICIENT)


def _masked(named: SDPBackend | None, call: AttentionCall) -> KernelChoice:
    """The choice where a mask is passed."""
    breaks_cudnn = any(length % 128 == 64 for length in (call.queries, call.keys))
    if call.cached or breaks_cudnn or named in (FLASH, EFFICIENT):
        return KernelChoice((EFFICIENT, MATH), expand=call.grouped)
    if named is CUDNN:
        return KernelChoice((CUDNN,) if call.trains else (CUDNN, MATH))
    # torch may choose the memory-efficient kernel, where it does not prefer cuDNN's.
    kernels = () if call.trains else (EFFICIENT, MATH)
    return KernelChoice(kernels, expand=call.grouped)
