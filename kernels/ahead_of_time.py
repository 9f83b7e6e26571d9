"""Compile kernels for a GPU that is not here: what a launcher would launch, without launching it.

A launcher called with tensors on torch's `meta` device has shapes, dtypes and aligned (null)
addresses, which is all that Triton specializes on. `record` runs it with every launch intercepted;
`compile_launch` compiles one of them for any target that the installed Triton knows, and leaves it
in Triton's cache on disk, where the run on the GPU finds it. Only what has not been imported under
TRITON_INTERPRET=1 can be compiled. Used by the tests and by tools/compile_kernels.py.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import launch

ARCHITECTURES = (
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_120",
    "gfx90a",
    "gfx942",
    "gfx950",
)


@dataclass(frozen=True)
class Launch:
    """One intercepted launch: the kernel, its grid, and its arguments."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the kernel's function, which a profile shows."""
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Resources:
    """What the machine code of one kernel uses. Loads and prefetches count instructions."""

    registers: int  # a thread
    spills: int  # instructions (NVIDIA), or registers (AMD)
    shared_bytes: int  # of a program
    loads_128_bit: int
    loads: int
    prefetches: int


def target(architecture: str) -> GPUTarget:
    """Triton's target for "sm_90", "gfx942" and the like."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64)


@contextlib.contextmanager
def _intercepted(architecture: str, launches: list[Launch]) -> Iterator[None]:
    """Every launch of a Triton kernel goes to `launches`.

    The launch table answers for `architecture`.
    """

    def capture(
        kernel: JITFunction, *arguments: Any, grid: tuple[int, ...], warmup: bool, **parameters: Any
    ) -> None:
        launches.append(Launch(kernel, grid, arguments, parameters))

    # The method itself is replaced: after one of Triton's hooks the kernel would be launched.
    true_run = JITFunction.run
    true_architecture = launch.architecture
    JITFunction.run = capture
    launch.architecture = lambda device: architecture  # type: ignore[assignment]
    try:
        yield
    finally:
        JITFunction.run = true_run
        launch.architecture = true_architecture


def record(call: Callable[[], Any], architecture: str) -> list[Launch]:
    """The launches that `call` (a launcher on `meta` tensors) makes on `architecture`."""
    launches: list[Launch] = []
    with _intercepted(architecture, launches):
        call()
    return launches


def compile_launch(recorded: Launch, architecture: str) -> Any:
    """Triton's compiled kernel.

    It has the signature, constants and alignment that the launch itself would have: these steps are
    those of `JITFunction.run`, and the key that Triton's cache is searched by depends on them.
    """
    kernel = recorded.kernel
    options = dict(recorded.parameters)
    options.setdefault("debug", False)
    backend = make_backend(target(architecture))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = bind(*recorded.arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target(architecture), options=parsed.__dict__)


def resources(compiled: Any) -> Resources:
    """Registers, spills and memory instructions, read from the machine code."""
    if "cubin" in compiled.asm:
        return _nvidia_resources(compiled)
    return _amd_resources(compiled)


def _amd_resources(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]
    registers, *_ = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    spills, *_ = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    loads_128_bit = re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)
    loads = re.findall(r"\b(?:global|buffer)_load_", assembly)
    return Resources(
        registers=int(registers),
        spills=int(spills),
        shared_bytes=compiled.metadata.shared,
        loads_128_bit=len(loads_128_bit),
        loads=len(loads),
        prefetches=0,  # counted on NVIDIA only
    )


def _nvidia_resources(compiled: Any) -> Resources:
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [str(binaries / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.check_output(dump, text=True)
        disassemble = [str(binaries / "nvdisasm"), file.name]
        code = subprocess.check_output(disassemble, text=True)
    # A plain load, or one of the asynchronous copies into shared memory that prefetch.
    load_128_bit = r"\bLDG\.E(?:\.\w+)*\.128\b|\bLDGSTS\.E(?:\.\w+)*\.128\b"
    *_, registers = re.findall(r"REG:(\d+)", usage)
    return Resources(
        registers=int(registers),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_bytes=compiled.metadata.shared,
        loads_128_bit=len(re.findall(load_128_bit, code)),
        loads=len(re.findall(r"\b(?:LDG|LDGSTS)\b", code)),
        prefetches=len(re.findall(r"\bLDGSTS\b", code)),
    )
