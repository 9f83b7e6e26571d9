"""The engines that encode blocks: this process, a pool of local processes, or Ray actors.

All give the same records, in any order.
"""

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
from megatron_completep.preprocess.encode import Encoder
from megatron_completep.preprocess.journal import Record
from megatron_completep.preprocess.settings import PreprocessSettings
from megatron_completep.preprocess.sources import Block

ENGINES = ("local", "ray")
Engine = Callable[[PreprocessSettings, Path, int, Iterator[Block]], Iterator[Record]]


def encode_here(
    settings: PreprocessSettings, shard: Path, workers: int, blocks: Iterator[Block]
) -> Iterator[Record]:
    """Encode in this process alone; `workers` is not used."""
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
    """Encode in a pool of processes, each with its own shard.

    A worker gets a block when it has none; the next block is read meanwhile.
    """
    # fork would copy the locks of the progress display's threads.
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: dict[Connection, Any] = {}
    try:
        # A worker that still imports what it needs would print a traceback at Ctrl-C.
        with interrupts_held():
            for number in range(workers):
                pipe, worker_pipe = context.Pipe()
                arguments = (worker_pipe, settings, Path(f"{shard}.{number}"), os.getpid())
                name = f"preprocess {number}"
                process = context.Process(target=_work, args=arguments, name=name, daemon=True)
                process.start()
                worker_pipe.close()  # so that the worker's death closes the pipe
                pipes.append(pipe)
                processes[pipe] = process
        yield from _dispatch(blocks, pipes, processes)
    finally:
        for pipe, process in processes.items():
            pipe.close()
            process.terminate()  # at any moment: what its journal does not name does not exist
            process.join()


def _dispatch(
    blocks: Iterator[Block], pipes: list[Connection], processes: dict[Connection, Any]
) -> Iterator[Record]:
    """Hand blocks to idle workers, and yield records as they come."""
    busy: dict[Connection, Block] = {}
    idle = list(pipes)
    block = next(blocks, None)
    while block is not None or busy:
        # Every idle worker gets a block before this process waits.
        if block is not None and idle:
            pipe = idle.pop()
            busy[pipe] = block
            _send(pipe, block, processes[pipe])
            block = next(blocks, None)
            continue
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            record = _receive(ready, busy.pop(ready), processes[ready])
            idle.append(ready)
            yield record


def _send(pipe: Connection, block: Block, process: Any) -> None:
    """Hand a block to a worker. Raises DataError where the worker has died."""
    try:
        pipe.send(block)
    except OSError as error:
        raise _death(process, block) from error


def _receive(pipe: Connection, block: Block, process: Any) -> Record:
    """The record of a block. Raises DataError where the worker has died, or raised one."""
    try:
        answer = pipe.recv()
    except (EOFError, OSError) as error:
        raise _death(process, block) from error
    if isinstance(answer, DataError):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f"a worker failed on {block.path}:\n{answer}")
    record: Record = answer
    return record


def _death(process: Any, block: Block) -> DataError:
    """The error that says how a worker died, and over which file."""
    process.join()
    if process.exitcode < 0:
        ending = f"was killed by signal {-process.exitcode}"
    else:
        ending = f"left with code {process.exitcode}"
    return DataError(
        f"{block.path}: a worker {ending} at work on this file (signal 9 often means that memory "
        "ran out: use fewer --workers). Finished blocks are kept; run the same command again to go "
        "on."
    )


def _work(pipe: Connection, settings: PreprocessSettings, shard: Path, parent: int) -> None:
    """A worker process: blocks in, records out, until the pipe closes.

    It leaves with process `parent`, in the midst of a block too.
    """
    work_for(parent)
    # Ctrl-C reaches the whole process group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one_thread_a_tokenizer()
    encoder = None
    try:
        while True:
            block = pipe.recv()
            try:
                # Made here, so that a tokenizer that cannot be read is told to the parent.
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
    """Encode in Ray actors over a file system that all nodes share.

    Joins the running cluster, or starts a local one. Raises DataError where Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise DataError(
            "--engine ray needs the package ray (pip install 'megatron-completep[ray]'), or use "
            "--engine local."
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # An actor's own process reads this variable as `one_thread_a_tokenizer` sets it.
    environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    actor_class = ray.remote(num_cpus=1, runtime_env=environment)(Encoder)
    idle = [actor_class.remote(settings, Path(f"{shard}.{number}")) for number in range(workers)]
    busy: dict[Any, Any] = {}  # actor by the result it works on
    block = next(blocks, None)
    while block is not None or busy:
        # Every idle actor gets a block before this process waits.
        if block is not None and idle:
            actor = idle.pop()
            busy[actor.encode.remote(block)] = actor
            block = next(blocks, None)
            continue
        ready, _ = ray.wait(list(busy), num_returns=1)
        idle.append(busy.pop(ready[0]))
        try:
            yield ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            # A user's mistake is raised as itself, without Ray's traceback around it.
            raise (error.cause if isinstance(error.cause, DataError) else error) from None


def one_thread_a_tokenizer() -> None:
    """Keep Hugging Face tokenizers from starting as many threads as cores in every worker.

    The pool is the parallelism.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def choose_engine(name: str, workers: int) -> Engine:
    """The function that encodes blocks. Raises DataError for an unknown name."""
    if name not in ENGINES:
        raise DataError(f"engine = {name!r} is unknown. Use one of: {', '.join(ENGINES)}.")
    if name == "ray":
        return encode_on_ray
    return encode_in_processes if workers > 1 else encode_here
