"""Generator states as JSON. Data order and dropout do not depend on them; what a user adds to the loop may."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators (of this rank, and of its GPU)."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, _text(np.array(words, np.uint64).tobytes()), gauss],
        "numpy": [
            name,
            _text(np.asarray(keys, np.uint32).tobytes()),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if _cuda_in_use():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned."""
    cuda = torch.cuda.default_generators[torch.cuda.current_device()] if _cuda_in_use() else None
    _set(state, random, np.random, torch.default_generator, cuda)


def check(state: dict[str, Any]) -> None:
    """Try it on generators that nobody uses. Raises what Python, numpy or torch raise for a state that is none."""
    cuda = (
        torch.Generator(torch.device("cuda", torch.cuda.current_device()))
        if _cuda_in_use()
        else None
    )
    _set(state, random.Random(), np.random.RandomState(), torch.Generator(), cuda)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _set(
    state: dict[str, Any],
    python: Any,
    of_numpy: Any,
    of_torch: torch.Generator,
    cuda: torch.Generator | None,
) -> None:
    version, words, gauss = state["python"]
    python.setstate(
        (version, tuple(int(w) for w in np.frombuffer(_bytes(words), np.uint64)), gauss)
    )
    name, keys, position, has_gauss, cached = state["numpy"]
    of_numpy.set_state((name, np.frombuffer(_bytes(keys), np.uint32), position, has_gauss, cached))
    of_torch.set_state(torch.frombuffer(bytearray(_bytes(state["torch"])), dtype=torch.uint8))
    if cuda is not None and "cuda" in state:
        cuda.set_state(torch.frombuffer(bytearray(_bytes(state["cuda"])), dtype=torch.uint8))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
