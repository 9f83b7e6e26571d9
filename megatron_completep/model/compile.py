"""torch.compile over the regions between linears.

A linear, a norm and the rotation hand weight gradients to a queue or work in place: side effects of
Python that a whole-graph compile refuses. Attention proper and the activation, which lie between
them, are the same function in every layer, so that one graph of each serves the whole model.
"""

from __future__ import annotations

import torch

from megatron_completep.model.attention import Attention, attend
from megatron_completep.model.gpt import GPT
from megatron_completep.model.mlp import ACTIVATIONS, MLP


def compile_regions(chunk: GPT, backend: str = "inductor") -> None:
    """Compile the regions of every block of a chunk, in place.

    Shapes are static: a micro-batch of another shape is compiled anew.
    """
    activation = ACTIVATIONS[chunk.config.activation]
    compiled_attend = torch.compile(attend, backend=backend, dynamic=False)
    compiled_activation = torch.compile(activation, backend=backend, dynamic=False)
    for module in chunk.modules():
        if isinstance(module, Attention):
            module.attend = compiled_attend
        elif isinstance(module, MLP):
            module.activation = compiled_activation
