"""The ranks of one replica whose model is sharded: rank 0 in the Serve replica, each other one in an actor.

Serve reserves a placement group for the replica, one bundle for each rank. All ranks load the model together, and do
from then on what rank 0 does. They live and die together: one that is gone, or fails where rank 0 does not, ends all of
them, so that Serve puts a whole replica in their place.
"""

import logging
import os
import socket
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
import torch
from ray.types import ObjectRef
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore
from transformers import AutoConfig

from actors.engine import Engine, RowKind
from actors.engine.calls import CallRecord, repeat
from actors.engine.models.sharding import check_shardable, join_group
from actors.settings import BaseModelSettings
from cluster.errors import ReplicaLost
from cluster.ranks import Follower, Leader, interface_of

START_TIMEOUT_S = 180.0
"""From the start of the actors until all have connected; their places are reserved by then."""

_CHECK_S = 0.2

logger = logging.getLogger(__name__)


def load_engine(settings: BaseModelSettings, rows: RowKind, *, num_sharing: int = 1, num_ranks: int = 1) -> Engine:
    """Load the model that the settings name.

    Args:
        settings: of the replica.
        rows: what the engine gives.
        num_sharing: ranks that compute on this node's cores, this one included.
        num_ranks: of the group that this process has joined.

    Raises:
        InvalidConfiguration: the engine cannot run it with these settings, or not with such rows.
    """
    engine = Engine.load(
        settings.model,
        dtype=getattr(torch, settings.dtype),
        max_sequences=settings.max_sequences,
        max_context=settings.max_context,
        cache_tokens=settings.cache_tokens,
        threads=settings.threads or max(1, len(os.sched_getaffinity(0)) // num_sharing),
        device=settings.device,
        rows=rows,
        num_ranks=num_ranks,
    )
    logger.info("%s runs through %s", settings.model, engine.description)
    return engine


class Ranks:
    """The other ranks, as rank 0 sees them."""

    def __init__(self, leader: Leader, actors: list[Any]) -> None:
        self._leader = leader
        # An actor lasts as long as its handle.
        self._actors = actors

    @classmethod
    def load(cls, settings: BaseModelSettings, rows: RowKind, thread: Executor) -> tuple[Engine, "Ranks"]:
        """Start the other ranks, and load the model with them.

        Args:
            settings: of the replica, `tensor_parallel` more than 1.
            rows: what the engine gives.
            thread: in which this rank's engine is made.

        Returns:
            This rank's engine, whose calls the others repeat, and the others.

        Raises:
            InvalidConfiguration: the model cannot be sharded so, before anything is started; or it cannot be loaded.
            ReplicaLost: a rank did not come.
        """
        num_ranks = settings.tensor_parallel
        check_shardable(AutoConfig.from_pretrained(settings.model, trust_remote_code=False), settings.model, num_ranks)
        host = ray.util.get_node_ip_address()
        leader = Leader(host, num_ranks)
        store, store_address = _serve_store(host)
        seats = _seats(ray.util.get_current_placement_group(), num_ranks)
        actors = [_actor(settings, seat) for seat in seats[1:]]
        runs = [
            actor.run.remote(settings, rows, seat, leader.address, leader.token, store_address)
            for actor, seat in zip(actors, seats[1:], strict=True)
        ]

        def load() -> Engine:
            leader.accept(START_TIMEOUT_S)
            _join(store, settings, seats[0], host)
            return load_engine(settings, rows, num_sharing=seats[0].num_sharing, num_ranks=num_ranks)

        try:
            engine = _result(thread.submit(load), runs)
        except BaseException:
            leader.close()
            raise
        engine.on_call = CallRecord(leader.send).add
        leader.watch(lambda rank: _end(f"rank {rank} of {settings.model} is gone"))
        return engine, cls(leader, actors)

    def fail(self, error: Exception) -> None:
        """End this replica: after a step that failed on one rank the others no longer hold the same."""
        _end(f"a step failed, {error!r}")

    def stop(self) -> None:
        """End the other ranks."""
        self._leader.close()


@dataclass(frozen=True, slots=True)
class _Seat:
    """Where a rank is."""

    rank: int
    num_ranks: int
    group: PlacementGroup
    num_sharing: int
    """Ranks on its node, itself included."""


class Rank:
    """The actor of a rank other than 0."""

    def run(
        self,
        settings: BaseModelSettings,
        rows: RowKind,
        seat: _Seat,
        leader: tuple[str, int],
        token: bytes,
        store: tuple[str, int],
    ) -> None:
        """Load the model with the other ranks, and do what rank 0 does until it is gone."""
        follower = Follower(leader, token, seat.rank, timeout_s=START_TIMEOUT_S)
        follower.watch(_leave)
        try:
            _join(TCPStore(*store, is_master=False), settings, seat, ray.util.get_node_ip_address())
            engine = load_engine(settings, rows, num_sharing=seat.num_sharing, num_ranks=seat.num_ranks)
        except BaseException:
            # Rank 0 has the error from Ray, unless it has loaded its part and waits for nothing.
            follower.close()
            raise
        _follow(engine, follower)


def _follow(engine: Engine, follower: Follower) -> NoReturn:
    """Do what rank 0 does until it is gone; a rank that cannot ends, and rank 0 hears of that."""
    try:
        while True:
            repeat(engine, follower.receive())
    except (EOFError, OSError):
        _leave()
    except Exception as error:
        _end(f"a step failed, {error!r}")


def _seats(group: PlacementGroup, num_ranks: int) -> list[_Seat]:
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return [
        _Seat(rank, num_ranks, group, num_sharing=list(nodes.values()).count(nodes[rank])) for rank in range(num_ranks)
    ]


def _actor(settings: BaseModelSettings, seat: _Seat) -> Any:
    """Start the actor of a rank in its place."""
    resources = settings.resources
    place = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.rank)
    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "resources": resources.custom}
    return ray.remote(Rank).options(scheduling_strategy=place, max_restarts=0, **options).remote()


def _serve_store(host: str) -> tuple[TCPStore, tuple[str, int]]:
    """Return the store in which the ranks of the process group find each other, and its address."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    # By itself it would listen on all interfaces.
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, (host, port)


def _join(store: TCPStore, settings: BaseModelSettings, seat: _Seat, host: str) -> None:
    if interface := interface_of(host):
        # Where gloo listens and connects; by itself it takes what the machine's name stands for, loopback perhaps.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    join_group(store, rank=seat.rank, num_ranks=seat.num_ranks, device=settings.device)


def _result(loading: "Future[Engine]", runs: list[ObjectRef[None]]) -> Engine:
    """Wait for this rank's engine, unless another rank fails before."""
    while not loading.done():
        ended, _ = ray.wait(runs, timeout=_CHECK_S)
        if ended:
            ray.get(ended)
            raise ReplicaLost("a rank has ended while the model was loaded")
    return loading.result()


def _end(reason: str) -> NoReturn:
    """End this process, in which a thread may wait for other ranks for ever, and so the whole replica."""
    logger.critical("%s: all ranks of this replica end, and Serve starts them again", reason)
    os._exit(1)


def _leave() -> NoReturn:
    """End this process, because rank 0 is gone."""
    logger.warning("rank 0 is gone: this rank ends")
    os._exit(0)
