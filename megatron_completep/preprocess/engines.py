"""Who encodes the blocks: this process, a pool of local processes, or Ray actors. All give the same records, in any order."""

import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_completep.errors import DataError
from megatron_completep.launch import interrupts_held, work_for
from megatron_completep.preprocess.encode import Encoder, Record
from megatron_completep.preprocess.settings import PreprocessSettings
from megatron_completep.preprocess.sources import Block

ENGINES = ("local", "ray")
Engine = Callable[[PreprocessSettings, Path, int, Iterator[Block]], Iterator[Record]]


def encode_here(
    settings: PreprocessSettings, shard: Path, workers: int, blocks: Iterator[Block]
) -> Iterator[Record]:
    """One worker: no other process."""
    one_thread_a_tokenizer()
    encoder = Encoder(settings, shard)
    try:
        for block in blocks:
            yield encoder.encode(block)
    finally:
        encoder.close()


def encode_in_processes(
    settings: PreprocessSettings, shard: Path, workers: int, blocks: Iterator[Block]
) -> Iterator[Record]:
    """A pool of processes, each with its own shard. A worker gets a block when it has none; the next block is read meanwhile."""
    context = multiprocessing.get_context(
        "spawn"
    )  # fork would copy the threads' locks of the progress display
    pipes: list[Connection] = []
    processes: dict[Connection, Any] = {}
    try:
        with interrupts_held():
            for number in range(workers):
                ours, theirs = context.Pipe()
                arguments = (theirs, settings, Path(f"{shard}.{number}"), os.getpid())
                process = context.Process(
                    target=_work, args=arguments, name=f"preprocess {number}", daemon=True
                )
                process.start()
                theirs.close()  # so that the worker's death closes the pipe
                pipes.append(ours)
                processes[ours] = process
        yield from _dispatch(blocks, pipes, processes)
    finally:
        for pipe, process in processes.items():
            pipe.close()
            process.terminate()  # at any moment: what its journal does not name does not exist
            process.join()


def _dispatch(
    blocks: Iterator[Block], pipes: list[Connection], processes: dict[Connection, Any]
) -> Iterator[Record]:
    busy: dict[Any, Block] = {}
    idle = list(pipes)
    block = next(blocks, None)
    while block is not None or busy:
        if block is not None and idle:
            pipe = idle.pop()
            busy[pipe] = block
            _send(pipe, block, processes[pipe])
            block = next(blocks, None)
            continue
        for ready in wait(list(busy)):
            record = _receive(ready, busy.pop(ready), processes)
            idle.append(ready)  # type: ignore[arg-type]
            yield record


def _send(pipe: Connection, block: Block, process: Any) -> None:
    try:
        pipe.send(block)
    except OSError as error:
        raise _death(process, block) from error


def _receive(pipe: Any, block: Block, processes: dict[Connection, Any]) -> Record:
    try:
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        raise _death(processes[pipe], block) from error
    if isinstance(answer, DataError):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f"a worker failed on {block.path}:\n{answer}")
    record: Record = answer
    return record


def _death(process: Any, block: Block) -> DataError:
    process.join()
    how = (
        f"was killed by signal {-process.exitcode}"
        if process.exitcode < 0
        else f"left with code {process.exitcode}"
    )
    return DataError(
        f"{block.path}: a worker {how} at work on this file (signal 9 often means that memory ran out: use fewer --workers). "
        "Finished blocks are kept; run the same command again to go on."
    )


def _work(pipe: Connection, settings: PreprocessSettings, shard: Path, parent: int) -> None:
    """A worker process: blocks in, records out, until the pipe closes; in the midst of a block too, it leaves with process `parent`."""
    work_for(parent)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides
    one_thread_a_tokenizer()
    encoder = None
    try:
        while True:
            block = pipe.recv()
            try:
                encoder = encoder or Encoder(settings, shard)
                answer: Record | DataError | str = encoder.encode(block)
            except DataError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            pipe.send(answer)
    except (EOFError, OSError):
        pass  # the parent is done, or gone


def encode_on_ray(
    settings: PreprocessSettings, shard: Path, workers: int, blocks: Iterator[Block]
) -> Iterator[Record]:
    """Ray actors over a file system that all nodes share. Joins the running cluster, or starts a local one."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise DataError(
            "--engine ray needs the package ray (pip install 'megatron-completep[ray]'), or use --engine local."
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    actor = ray.remote(num_cpus=1, runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}})(
        Encoder
    )
    idle = [actor.remote(settings, Path(f"{shard}.{number}")) for number in range(workers)]
    busy: dict[Any, Any] = {}
    block = next(blocks, None)
    while block is not None or busy:
        if block is not None and idle:
            worker = idle.pop()
            busy[worker.encode.remote(block)] = worker
            block = next(blocks, None)
            continue
        ready, _ = ray.wait(list(busy), num_returns=1)
        idle.append(busy.pop(ready[0]))
        try:
            yield ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, DataError) else error) from None


def one_thread_a_tokenizer() -> None:
    """The pool is the parallelism: Hugging Face tokenizers would start as many threads as cores in every worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def choose_engine(name: str, workers: int) -> Engine:
    """The function that encodes blocks. Raises DataError for an unknown name."""
    if name not in ENGINES:
        raise DataError(f"engine = {name!r} is unknown. Use one of: {', '.join(ENGINES)}.")
    if name == "ray":
        return encode_on_ray
    return encode_in_processes if workers > 1 else encode_here
