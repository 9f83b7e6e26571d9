"""What settings of the data do not go together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_completep.config.remedies import Problem
from megatron_completep.config.schema import Config


def source_problems(config: Config) -> Iterator[Problem]:
    """The sources of training and validation, and the split."""
    data = config.data
    if data.validation is not None and data.split is not None:
        yield (
            f"data.split = '{data.split}' and data.validation are both given. "
            "Set one of the two to null."
        )
    # An empty list is not the same as null: there would be nothing to validate on.
    if data.validation == []:
        yield "data.validation = [] names no source. Use null for a run without validation."
    split_problem = None if data.split is None else _split_problem(data.split)
    if split_problem is not None:
        yield (
            f"data.split = '{data.split}' {split_problem}. "
            "Write the three parts training, validation and test, such as '969,30,1'."
        )
    elif config.training.validation_at_start and not _validates(config):
        yield (
            "training.validation_at_start = true has nothing to validate on. Give "
            "data.validation, or data.split a second part, or set it to false."
        )
    blends = {"train": data.train, "validation": data.validation or []}
    for name, sources in blends.items():
        for index, source in enumerate(sources):
            if source.weight is not None and source.epochs is not None:
                yield (
                    f"data.{name}.{index}: weight = {source.weight} and epochs = {source.epochs} "
                    f"are both given for {source.prefix}. Keep one of the two."
                )


def _validates(config: Config) -> bool:
    """Whether there is anything to validate on; the split has no problem."""
    data = config.data
    if data.validation:
        return True
    return data.split is not None and float(data.split.split(",")[1]) > 0


def _split_problem(split: str) -> str | None:
    """What is wrong with a split, as the words that follow it; None: nothing."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        return "is not a list of numbers"
    if len(shares) != 3:
        return f"has {len(shares)} parts"
    if not all(0 <= share < math.inf for share in shares):
        return "has a part below zero or without bound"
    return None if shares[0] > 0 else "leaves nothing for training"


def tokenizer_problems(config: Config) -> Iterator[Problem]:
    """The tokenizer's model."""
    tokenizer = config.data.tokenizer
    if tokenizer is None:
        return
    if tokenizer.type == "bytes" and tokenizer.model is not None:
        yield (
            f"data.tokenizer.model = '{tokenizer.model}' is not used by "
            "data.tokenizer.type = bytes. Remove it."
        )
    if tokenizer.type != "bytes" and tokenizer.model is None:
        yield (
            f"data.tokenizer.model is null, but data.tokenizer.type = {tokenizer.type} needs one. "
            "Give its model, or use the type bytes."
        )
