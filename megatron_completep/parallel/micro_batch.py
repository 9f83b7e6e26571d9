"""The sizes of a micro-batch on paper.

A module that is asked how many bytes it keeps for the backward pass is told these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatchSizes:
    """Tokens of one micro-batch as one rank sees them, and bytes of an element by what it is.

    tokens: S * B, those that attention, the MLP's activation and the loss see.
    local_tokens: s * B, those of this rank's part of the residual stream.
    whole_tokens: W * B, those of whole sequences, whose keys and values context ranks gather.
    """

    tokens: int
    local_tokens: int
    whole_tokens: int
    element_bytes: int  # of parameters and activations
    stream_bytes: int  # of the residual stream
    wide_bytes: int  # of statistics, rotary angles and gradients
