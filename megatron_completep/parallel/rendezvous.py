"""Where the ranks of a run meet: a key-value store that rank 0, or the launcher, holds.

Ranks that do not come are named. Every wait is short and in Python, so that Ctrl-C works between
two of them.
"""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_completep.errors import ConfigError
from megatron_completep.launch import Launch

LOOK_SECONDS = 0.05  # between two checks of who has come
SAY_SECONDS = 30.0  # after which the missing ranks are told to the user, and the wait goes on
CONNECT_SECONDS = 5.0  # for the store to answer to a connection


def say_nothing(text: str) -> None:
    """Print nothing: the `say` of ranks other than rank 0."""


def rendezvous_store(
    launch: Launch, patience_seconds: float, say: Callable[[str], None] = say_nothing
) -> dist.Store | None:
    """The store of this start, returned when every rank has come to it.

    For one process there is none. Where a process group exists already, its store is returned.

    Raises ConfigError when an address or a port cannot be used, when two processes have the same
    rank or different WORLD_SIZEs, and, after `patience_seconds`, with the ranks that did not come.
    """
    if launch.world_size == 1:
        return None
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + patience_seconds
    opened = _open_store(launch, deadline, patience_seconds)
    # torchrun keeps its store over restarts: without a prefix a rank would find the addresses of
    # processes that died.
    store = dist.PrefixStore(f"start_{launch.restart_count}", opened)
    RollCall(store, launch, say).run(deadline, patience_seconds)
    # From here on the store serves the process group, whose waits may be long.
    store.set_timeout(timedelta(seconds=patience_seconds))
    return store


class RollCall:
    """Every rank writes its number into the store, and waits for the numbers of all others."""

    def __init__(self, store: dist.Store, launch: Launch, say: Callable[[str], None] = say_nothing):
        self._store = store
        self._launch = launch
        self._say = say
        self._missing = set(range(launch.world_size))

    def run(self, deadline: float, patience_seconds: float) -> None:
        """Return when all ranks have come; raises ConfigError as `rendezvous_store` does."""
        try:
            self._sign()
            say_at = time.monotonic() + SAY_SECONDS
            while self._missing:
                self._look()
                if not self._missing:
                    break
                if time.monotonic() > deadline:
                    raise self._missing_ranks(patience_seconds)
                if time.monotonic() > say_at:
                    self._say(
                        f"waiting for rank {_list(self._missing)} "
                        f"of {self._launch.world_size} to start"
                    )
                    say_at = float("inf")  # once is enough
                time.sleep(LOOK_SECONDS)
        except RuntimeError as error:  # every error of a store is one
            raise self._store_lost(error) from None

    def _sign(self) -> None:
        launch = self._launch
        processes = self._store.add(f"processes/{launch.rank}", 1)
        # torchrun hands out the ranks itself, and may start one again.
        if processes > 1 and not launch.by_torchrun:
            raise ConfigError(
                f"rank {launch.rank}: {processes} processes have RANK = {launch.rank}, "
                f"this one on {platform.node()}. Give every process a number of its own, "
                "and wait until an earlier run on this port has ended."
            )
        self._store.set(f"here/{launch.rank}", str(launch.world_size))

    def _look(self) -> None:
        """Check who has come since, and that they were told the same number of processes."""
        launch = self._launch
        for rank in sorted(self._missing):
            if not self._store.check([f"here/{rank}"]):
                continue
            world_size = int(self._store.get(f"here/{rank}"))
            if world_size != launch.world_size:
                raise ConfigError(
                    f"rank {launch.rank} was told WORLD_SIZE = {launch.world_size}, "
                    f"rank {rank} was told {world_size}. "
                    "Start all processes with the same WORLD_SIZE."
                )
            self._missing.discard(rank)

    def _missing_ranks(self, patience_seconds: float) -> ConfigError:
        started = self._launch.world_size - len(self._missing)
        return ConfigError(
            f"rank {_list(self._missing)} of {self._launch.world_size} did not start within "
            f"{patience_seconds:g} s (parallel.timeout_minutes), {started} did. "
            "Look at the log of that process and its host, "
            "or set WORLD_SIZE to the number of processes that you start."
        )

    def _store_lost(self, error: RuntimeError) -> ConfigError:
        waiting = f" while waiting for rank {_list(self._missing)}" if self._missing else ""
        return ConfigError(
            f"rank {self._launch.rank}: {self._launch.store_holder}, which hosts the store, "
            f"left{waiting}: {_first_line(error)} Look at its log."
        )


def _open_store(launch: Launch, deadline: float, patience_seconds: float) -> dist.TCPStore:
    """The store itself on the rank that holds it, a connection to it on all others."""
    host = launch.store_host
    port = launch.store_port
    holds_store = launch.rank == 0 and not launch.launcher_holds_store
    if not holds_store:
        _wait_for_port(launch, deadline, patience_seconds)
    try:
        # Not the default of waiting for all workers: the roll call does that, and names them.
        return dist.TCPStore(
            host,
            port,
            None,
            is_master=holds_store,
            timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if holds_store and "EADDRINUSE" in str(error):
            raise ConfigError(
                f"rank 0: MASTER_PORT = {port} is in use on {platform.node()}, "
                "perhaps by another run. Choose a free port, the same for all ranks."
            ) from None
        raise ConfigError(
            f"rank {launch.rank}: what answers at {host}:{port} (MASTER_ADDR, MASTER_PORT) "
            f"is no store: {_first_line(error)} "
            f"Check that {launch.store_holder} runs there, with the same port."
        ) from None


def _wait_for_port(launch: Launch, deadline: float, patience_seconds: float) -> None:
    """Wait until a process answers at the store's address.

    The name of the host may not be known yet, and the host may not be up yet: both can change.
    """
    address = launch.store_host, launch.store_port
    while True:
        try:
            socket.create_connection(address, timeout=1.0).close()
            return
        except socket.gaierror:
            reason = "the host's name is not known"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    raise ConfigError(
        f"rank {launch.rank}: {launch.store_holder} did not answer at "
        f"{launch.store_host}:{launch.store_port} (MASTER_ADDR, MASTER_PORT) "
        f"within {patience_seconds:g} s: {reason}. Start it, or correct the address."
    )


def _list(ranks: set[int]) -> str:
    """The numbers in order, at most eight of them."""
    numbers = sorted(ranks)
    listed = ", ".join(map(str, numbers[:8]))
    more = len(numbers) - 8
    return f"{listed} and {more} more" if more > 0 else listed


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    first_line = lines[0] if lines else type(error).__name__
    return first_line.rstrip(". ") + "."
