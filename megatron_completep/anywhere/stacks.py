"""Where the blocks of a model of unknown class stand, and how wide its residual stream is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Stack:
    """A container whose entries are the blocks of a model."""

    name: str  # of the container in the model
    entries: tuple[str, ...]  # names of the blocks in the container, in order

    def block_of(self, name: str) -> int | None:
        """The number of the block that a parameter belongs to; None: to no block of this stack."""
        prefix = f"{self.name}." if self.name else ""
        if not name.startswith(prefix):
            return None
        entry = name[len(prefix) :].split(".")[0]
        return self.entries.index(entry) if entry in self.entries else None

    def renamed(self, name: str, block: int) -> str:
        """The name of the same parameter in another block of a stack with numbered entries."""
        prefix = f"{self.name}." if self.name else ""
        inner = name[len(prefix) :].split(".")[1:]
        return ".".join([prefix + self.entries[block], *inner])


def stacks_of(model: nn.Module) -> list[Stack]:
    """The outermost containers of blocks, in the model's order.

    A block has modules of its own, and is of the class of its neighbours. A Sequential may hold
    something else than blocks, so that it must have two of one class.
    """
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        if any(stack.block_of(f"{name}.") is not None for stack in stacks):
            continue
        composed = {key: child for key, child in module.named_children() if _is_composed(child)}
        classes = [type(child) for child in composed.values()]
        # Blocks of several kinds may alternate in a list; in a Sequential one kind must repeat.
        enough = 2 if isinstance(module, nn.Sequential) else 1
        if classes and max(map(classes.count, classes)) >= enough:
            stacks.append(Stack(name, tuple(composed)))
    return stacks


def _is_composed(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def embeddings_of(model: nn.Module, stacks: list[Stack]) -> Iterator[nn.Embedding]:
    """The embeddings outside the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not in_block(name, stacks):
            yield module


def in_block(name: str, stacks: list[Stack]) -> bool:
    """Whether a parameter or module of this name stands in a block."""
    return any(stack.block_of(name) is not None for stack in stacks)


def stream_width(model: nn.Module, stacks: list[Stack]) -> int | None:
    """The width of the residual stream: that of the largest embedding; None without one."""
    weights: list[Tensor] = [embedding.weight for embedding in embeddings_of(model, stacks)]
    if not weights:
        return None
    return max(weights, key=Tensor.numel).shape[-1]
