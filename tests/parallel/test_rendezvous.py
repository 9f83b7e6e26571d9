"""The ranks meet, or one message says who did not come."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch.distributed as dist

from megatron_completep.errors import ConfigError
from megatron_completep.launch import Launch
from megatron_completep.parallel import rendezvous
from megatron_completep.parallel.rendezvous import RollCall, rendezvous_store


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


def rank_of(rank: int, world_size: int, port: int) -> Launch:
    return Launch(rank, world_size, rank, launched=True, store_host="127.0.0.1", store_port=port)


def outcome(call: Callable[[], object]) -> str:
    """What a rank's error says; "met" where there is none."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "met"


def test_ranks_that_all_come_meet_in_one_store(port: int) -> None:
    stores: dict[int, dist.Store | None] = {}
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(
                lambda rank: stores.update({rank: rendezvous_store(rank_of(rank, 3, port), 60)}),
                range(3),
            )
        )
    stores[1].set("said", "hello")  # type: ignore[union-attr]
    assert stores[0].get("said") == stores[2].get("said") == b"hello"  # type: ignore[union-attr]
    assert rendezvous_store(Launch(), 0) is None


@pytest.mark.parametrize(("came", "missing"), [([0, 2], "1"), ([0], "1, 2")])
def test_ranks_that_do_not_come_are_named_by_those_that_did(came: list[int], missing: str) -> None:
    store, time_is_up = dist.HashStore(), 0.0
    for rank in came[1:]:
        RollCall(store, rank_of(rank, 3, 1))._sign()
    said = outcome(lambda: RollCall(store, rank_of(0, 3, 1)).run(time_is_up, 90))
    assert said.startswith(
        f"rank {missing} of 3 did not start within 90 s (parallel.timeout_minutes), "
        f"{len(came)} did. Look at the log"
    )


def test_a_rank_0_that_does_not_come_is_named_with_its_address(port: int) -> None:
    said = outcome(lambda: rendezvous_store(rank_of(1, 2, port), 0.0))
    assert said.startswith(
        f"rank 1: rank 0 did not answer at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within 0 s: "
    )
    unknown = replace(rank_of(1, 2, port), store_host="no-such-host.invalid")
    assert "the host's name is not known" in outcome(lambda: rendezvous_store(unknown, 0.0))


def test_who_is_missing_is_said_while_they_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "SAY_SECONDS", 0.0)
    store, said = dist.HashStore(), []
    late = RollCall(store, rank_of(1, 3, 1))

    def say(text: str) -> None:
        said.append(text)
        RollCall(store, rank_of(2, 3, 1))._sign()
        late._sign()

    RollCall(store, rank_of(0, 3, 1), say).run(time.monotonic() + 60, 60)
    assert said == ["waiting for rank 1, 2 of 3 to start"]


def test_a_port_in_use_is_named_by_the_rank_that_wants_it(port: int) -> None:
    with socket.create_server(("", port)):
        said = outcome(lambda: rendezvous_store(rank_of(0, 2, port), 5))
    assert said.startswith(f"rank 0: MASTER_PORT = {port} is in use on ")
    assert "Choose a free port" in said


def test_what_is_no_store_at_the_address_is_said(
    monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr(rendezvous, "CONNECT_SECONDS", 0.5)

    def answer_as_a_web_server(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()
            except OSError:
                return

    with socket.create_server(("", port)) as server:
        threading.Thread(target=answer_as_a_web_server, args=(server,), daemon=True).start()
        said = outcome(lambda: rendezvous_store(rank_of(1, 2, port), 5))
        server.shutdown(socket.SHUT_RDWR)
    assert re.match(
        rf"rank 1: what answers at 127.0.0.1:{port} \(MASTER_ADDR, MASTER_PORT\) is no store: ",
        said,
    )


def test_two_processes_with_one_rank_and_ranks_told_of_other_worlds_are_refused() -> None:
    store = dist.HashStore()
    RollCall(store, rank_of(1, 2, 1))._sign()
    with pytest.raises(ConfigError, match="rank 1: 2 processes have RANK = 1"):
        RollCall(store, rank_of(1, 2, 1))._sign()
    RollCall(
        store, replace(rank_of(1, 2, 1), by_torchrun=True)
    )._sign()  # which gives the ranks itself
    with pytest.raises(ConfigError, match="rank 0 was told WORLD_SIZE = 4, rank 1 was told 2"):
        RollCall(store, rank_of(0, 4, 1)).run(time.monotonic() + 60, 60)


def test_the_holder_of_the_store_that_leaves_is_named() -> None:
    class Gone(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer. This may indicate\na crash")

    with pytest.raises(
        ConfigError,
        match=(
            r"rank 1: rank 0, which hosts the store, left while waiting for rank 0, 1: "
            r"Connection reset"
        ),
    ):
        RollCall(Gone(), rank_of(1, 2, 1)).run(time.monotonic() + 60, 60)
