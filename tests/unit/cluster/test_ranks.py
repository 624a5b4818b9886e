"""Rank 0 and the others over their connections: messages, strangers, and the end of either side."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from queue import Queue

import pytest

from cluster.errors import ReplicaLost
from cluster.ranks import Follower, Leader, interface_of

HOST = "127.0.0.1"
TIMEOUT_S = 30.0


@pytest.fixture
def leader() -> Iterator[Leader]:
    leader = Leader(HOST, 3)
    yield leader
    leader.close()


@pytest.fixture
def follow(leader: Leader) -> Iterator[Callable[[int], Follower]]:
    with ExitStack() as stack:

        def follow(rank: int, token: bytes = leader.token) -> Follower:
            follower = Follower(leader.address, token, rank, timeout_s=TIMEOUT_S)
            stack.callback(follower.close)
            return follower

        yield follow


@pytest.fixture
def followers(leader: Leader, follow: Callable[[int], Follower]) -> list[Follower]:
    followers = [follow(2), follow(1)]
    leader.accept(TIMEOUT_S)
    return followers


def test_every_message_reaches_every_rank_in_order(leader: Leader, followers: list[Follower]) -> None:
    messages = [b"first", b"", b"x" * 3_000_000]
    # More than the kernel keeps: somebody must read.
    sending = threading.Thread(target=lambda: list(map(leader.send, messages)))
    sending.start()
    received = [[follower.receive() for _ in messages] for follower in followers]
    sending.join(TIMEOUT_S)
    assert received == [messages, messages]


def test_a_stranger_is_not_let_in_and_keeps_nobody_out(leader: Leader, follow: Callable[..., Follower]) -> None:
    strangers = [follow(1, bytes(32)), follow(3)]
    with socket.create_connection(leader.address) as silent:
        silent.shutdown(socket.SHUT_WR)
        followers = [follow(2), follow(1)]
        leader.accept(TIMEOUT_S)
    leader.send(b"plan")
    assert [follower.receive() for follower in followers] == [b"plan", b"plan"]
    for stranger in strangers:
        with pytest.raises((EOFError, OSError)):
            stranger.receive()


def test_ranks_that_do_not_come_are_named(leader: Leader, follow: Callable[[int], Follower]) -> None:
    follow(1)
    with pytest.raises(ReplicaLost, match=r"ranks \[2\] have not come within 0.2 s"):
        leader.accept(0.2)


def test_it_listens_on_its_own_address_and_only_until_all_have_come(
    leader: Leader, follow: Callable[[int], Follower]
) -> None:
    assert leader.address[0] == HOST
    for rank in (1, 2):
        follow(rank)
    leader.accept(TIMEOUT_S)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(leader.address)


def test_rank_0_hears_of_a_rank_that_is_gone_though_it_never_reads(leader: Leader, followers: list[Follower]) -> None:
    lost: Queue[int] = Queue()
    leader.watch(lost.put)
    leader.send(b"plan")
    followers[0].close()
    assert lost.get(timeout=TIMEOUT_S) == 2


def test_a_rank_hears_that_rank_0_is_gone_while_it_computes(leader: Leader, followers: list[Follower]) -> None:
    follower, other = followers
    lost: Queue[str] = Queue()
    leader.watch(lambda rank: lost.put(f"rank {rank}"))
    follower.watch(lambda: lost.put("rank 0"))
    other.watch(lambda: lost.put("rank 0"))
    leader.send(b"plan")
    leader.close()
    assert [lost.get(timeout=TIMEOUT_S) for _ in range(2)] == ["rank 0", "rank 0"]
    # What was sent before can still be read.
    assert follower.receive() == b"plan"
    with pytest.raises(EOFError):
        follower.receive()
    # It ended the connections itself.
    assert lost.empty()


def test_an_address_has_an_interface() -> None:
    assert interface_of(HOST) == "lo"
    assert interface_of("203.0.113.9") is None
