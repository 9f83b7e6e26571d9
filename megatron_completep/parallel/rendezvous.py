"""Where the ranks of a run meet: a key-value store that rank 0, or the launcher, holds. Whoever does not come is named.

Every wait is short and in Python, so that Ctrl-C is heard in between.
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

LOOK_SECONDS = 0.05  # between two looks at who has come
SAY_SECONDS = 30.0  # after which whoever is missing is said, and the wait goes on
CONNECT_SECONDS = 5.0  # for the store to answer to a connection


def nobody_hears(text: str) -> None:
    pass


def meet(
    launch: Launch, patience_seconds: float, say: Callable[[str], None] = nobody_hears
) -> dist.Store | None:
    """The store of this start, when every rank has come to it; None for one process. Of a group that exists already, its store.

    Raises ConfigError when an address or a port cannot be used, when two processes have one number or not one WORLD_SIZE, and, after
    `patience_seconds`, with the ranks that did not come.
    """
    if launch.world_size == 1:
        return None
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + patience_seconds
    # torchrun keeps its store over restarts: without a prefix a rank would find addresses of the processes that died.
    store = dist.PrefixStore(
        f"start_{launch.restart_count}", _open_store(launch, deadline, patience_seconds)
    )
    Roll(store, launch, say).call(deadline, patience_seconds)
    store.set_timeout(timedelta(seconds=patience_seconds))
    return store


class Roll:
    """Who has come: every rank writes its name into the store, and waits for the names of all others."""

    def __init__(
        self, store: dist.Store, launch: Launch, say: Callable[[str], None] = nobody_hears
    ):
        self._store, self._launch, self._say = store, launch, say
        self._missing = set(range(launch.world_size))

    def call(self, deadline: float, patience_seconds: float) -> None:
        """Returns when all are there; raises ConfigError as `meet` does."""
        try:
            self._sign()
            say_at = time.monotonic() + SAY_SECONDS
            while self._missing:
                self._look()
                if self._missing and time.monotonic() > deadline:
                    raise self._not_there(patience_seconds)
                if self._missing and time.monotonic() > say_at:
                    self._say(
                        f"waiting for rank {_list(self._missing)} of {self._launch.world_size} to start"
                    )
                    say_at = float("inf")
                if self._missing:
                    time.sleep(LOOK_SECONDS)
        except RuntimeError as error:  # every error of a store is one
            raise self._store_lost(error) from None

    def _sign(self) -> None:
        launch = self._launch
        same = self._store.add(f"processes/{launch.rank}", 1)
        if same > 1 and not launch.by_torchrun:
            raise ConfigError(
                f"rank {launch.rank}: {same} processes have RANK = {launch.rank}, this one on {platform.node()}. "
                "Give every process a number of its own, and wait until an earlier run on this port has ended."
            )
        self._store.set(f"here/{launch.rank}", str(launch.world_size))

    def _look(self) -> None:
        """Check who has come since, and that they were told of as many processes as this one."""
        for rank in sorted(self._missing):
            if not self._store.check([f"here/{rank}"]):
                continue
            told = int(self._store.get(f"here/{rank}"))
            if told != self._launch.world_size:
                raise ConfigError(
                    f"rank {self._launch.rank} was told WORLD_SIZE = {self._launch.world_size}, rank {rank} was told {told}. "
                    "Start all processes with the same WORLD_SIZE."
                )
            self._missing.discard(rank)

    def _not_there(self, patience_seconds: float) -> ConfigError:
        come = self._launch.world_size - len(self._missing)
        return ConfigError(
            f"rank {_list(self._missing)} of {self._launch.world_size} did not start within {patience_seconds:g} s "
            f"(parallel.timeout_minutes), {come} did. Look at the log of that process and its host, "
            "or set WORLD_SIZE to the number of processes that you start."
        )

    def _store_lost(self, error: RuntimeError) -> ConfigError:
        waiting = f" while waiting for rank {_list(self._missing)}" if self._missing else ""
        return ConfigError(
            f"rank {self._launch.rank}: {self._launch.store_holder}, which holds the store, left{waiting}: {_first_line(error)} "
            "Look at its log."
        )


def _open_store(launch: Launch, deadline: float, patience_seconds: float) -> dist.TCPStore:
    """The store itself on the rank that holds it, a connection to it on all others."""
    host, port = launch.store_host, launch.store_port
    holds = launch.rank == 0 and not launch.launcher_holds_store
    if not holds:
        _wait_for_port(launch, deadline, patience_seconds)
    try:
        return dist.TCPStore(
            host,
            port,
            None,
            is_master=holds,
            timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if holds and "EADDRINUSE" in str(error):
            raise ConfigError(
                f"rank 0: MASTER_PORT = {port} is in use on {platform.node()}, perhaps by another run. "
                "Choose a free port, the same for all ranks."
            ) from None
        raise ConfigError(
            f"rank {launch.rank}: what answers at {host}:{port} (MASTER_ADDR, MASTER_PORT) is no store: {_first_line(error)} "
            f"Check that {launch.store_holder} runs there, with the same port."
        ) from None


def _wait_for_port(launch: Launch, deadline: float, patience_seconds: float) -> None:
    """Until somebody answers at the address. A name may not be known yet, a host may not be up yet: both are waited for."""
    while True:
        try:
            socket.create_connection((launch.store_host, launch.store_port), timeout=1.0).close()
            return
        except OSError as error:
            reason = (
                "the host's name is not known"
                if isinstance(error, socket.gaierror)
                else error.strerror or str(error)
            )
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    raise ConfigError(
        f"rank {launch.rank}: {launch.store_holder} did not answer at {launch.store_host}:{launch.store_port} (MASTER_ADDR, MASTER_PORT) "
        f"within {patience_seconds:g} s: {reason}. Start it, or correct the address."
    )


def _list(ranks: set[int]) -> str:
    """Numbers in order, at most eight of them."""
    numbers = sorted(ranks)
    return ", ".join(map(str, numbers[:8])) + (
        f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ") + "."
