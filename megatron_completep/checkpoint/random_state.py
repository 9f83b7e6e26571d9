"""States of random generators as JSON.

Data order and dropout do not depend on them, but what a user adds to the training loop may.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """States of the generators of Python, numpy and torch, on this rank and on its GPU."""
    version, words, gauss = random.getstate()
    word_bytes = np.array(words, np.uint64).tobytes()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    key_bytes = np.asarray(keys, np.uint32).tobytes()
    state = {
        "python": [version, _encode(word_bytes), gauss],
        # JSON takes Python's numbers, not numpy's.
        "numpy": [name, _encode(key_bytes), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
    }
    if _cuda_in_use():
        state["cuda"] = _encode(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned."""
    cuda = None
    if _cuda_in_use():
        cuda = torch.cuda.default_generators[torch.cuda.current_device()]
    _set(state, random, np.random, torch.default_generator, cuda)


def check(state: dict[str, Any]) -> None:
    """Set the state on generators that nobody uses.

    Raises what Python, numpy or torch raise where it is none.
    """
    cuda = None
    if _cuda_in_use():
        cuda = torch.Generator(torch.device("cuda", torch.cuda.current_device()))
    _set(state, random.Random(), np.random.RandomState(), torch.Generator(), cuda)


def _cuda_in_use() -> bool:
    # torch gives this function no types.
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    return torch.cuda.is_available() and is_initialized()


def _set(
    state: dict[str, Any],
    of_python: Any,
    of_numpy: Any,
    of_torch: torch.Generator,
    of_cuda: torch.Generator | None,
) -> None:
    """Set the state of each generator. The modules `random` and `np.random` serve as generators."""
    version, encoded_words, gauss = state["python"]
    words = np.frombuffer(_decode(encoded_words), np.uint64)
    of_python.setstate((version, tuple(int(word) for word in words), gauss))

    name, encoded_keys, position, has_gauss, cached = state["numpy"]
    keys = np.frombuffer(_decode(encoded_keys), np.uint32)
    of_numpy.set_state((name, keys, position, has_gauss, cached))

    of_torch.set_state(_byte_tensor(state["torch"]))
    # A checkpoint that was written without a GPU has no state for one, and the reverse.
    if of_cuda is not None and "cuda" in state:
        of_cuda.set_state(_byte_tensor(state["cuda"]))


def _byte_tensor(encoded: str) -> torch.Tensor:
    # A bytearray, as torch warns of memory that cannot be written.
    return torch.frombuffer(bytearray(_decode(encoded)), dtype=torch.uint8)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(encoded: str) -> bytes:
    return base64.b64decode(encoded, validate=True)
