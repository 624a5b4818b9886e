"""With certificates, a stranger on the network can neither read rows and answers nor write any."""

import logging
import os
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.delivery import Inbox, Outlets, Receipt
from cluster.errors import InvalidConfiguration, ReplicaLost
from cluster.exchange import Step, StepRows, StepServer, StepStream, Work
from cluster.exchange.segment import Segment
from cluster.tls import Tls
from tests.certificates import Authority

HOST = "127.0.0.1"
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def node(authority: Authority) -> Tls:
    return authority.node(HOST)


@pytest.fixture(scope="module")
def elsewhere(authority: Authority) -> Tls:
    """Signed by the right authority, for another address."""
    return authority.node("10.9.8.7", name="elsewhere")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory, node: Tls) -> dict[str, Tls | None]:
    other = Authority(tmp_path_factory.mktemp("tls") / "others").node(HOST)
    return {"none": None, "of another authority": replace(other, authority=node.authority)}


class Ones:
    """A replica whose rows are ones, and that remembers who was there."""

    def __init__(self) -> None:
        self.coordinators: list[str] = []

    async def step(self, coordinator: str, step: Step) -> StepRows:
        self.coordinators.append(coordinator)
        return StepRows(torch.ones(len(step.work), 3))

    def leave(self, coordinator: str, sequence: str) -> None:
        pass

    async def detach(self, coordinator: str) -> None:
        pass


@asynccontextmanager
async def serving(tls: Tls | None) -> AsyncIterator[tuple[StepServer, Ones]]:
    handler = Ones()
    server = StepServer(handler, row_width=3, dtype=torch.float32, max_rows=4, host=HOST, tls=tls)
    await server.start()
    try:
        yield server, handler
    finally:
        await server.stop()


async def connect(server: StepServer, tls: Tls | None, token: str | None = None) -> StepStream:
    return await StepStream.connect(
        server.address, token=token or server.token, coordinator="c", timeout_s=TIMEOUT_S, tls=tls
    )


async def test_steps_travel_under_tls(node: Tls) -> None:
    async with serving(node) as (server, _):
        stream = await connect(server, node)
        with await stream.step([Work("s", 0, [1], [0])], timeout_s=TIMEOUT_S) as rows:
            assert torch.equal(rows.tensor, torch.ones(1, 3))
        await stream.close()


@pytest.mark.parametrize("certificate", ["none", "of another authority"])
async def test_a_stranger_gets_no_stream_even_with_the_token(
    node: Tls, strangers: dict[str, Tls | None], certificate: str
) -> None:
    async with serving(node) as (server, handler):
        with pytest.raises(ReplicaLost):
            await connect(server, strangers[certificate])
        assert handler.coordinators == []
        assert not server.attached("c")


async def test_a_certificate_without_the_token_is_not_enough(node: Tls, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(node) as (server, _):
        with caplog.at_level(logging.WARNING), pytest.raises(ReplicaLost, match="the token is not this replica's"):
            await connect(server, node, token="guessed")
        assert len(caplog.records) == 1
        assert "guessed" not in caplog.text
        assert server.token not in caplog.text


async def test_a_replica_that_only_claims_an_address_gets_no_steps(
    node: Tls, elsewhere: Tls, strangers: dict[str, Tls | None]
) -> None:
    for false in (elsewhere, strangers["of another authority"], None):
        async with serving(false) as (server, handler):
            with pytest.raises(ReplicaLost):
                await connect(server, node)
            assert handler.coordinators == []


async def test_pieces_travel_under_tls(node: Tls) -> None:
    inbox, outlets = Inbox(HOST, tls=node), Outlets(node)
    await inbox.start()
    with inbox.open() as feed:
        outlet = await outlets.reach(feed.destination)
        outlet.put(feed.destination.key, "piece")
        feed.settle(Receipt(num_items=1))
        assert await feed.read() == ["piece"]
        assert await feed.read() == []
    await outlets.close()
    await inbox.stop()


@pytest.mark.parametrize("certificate", ["none", "of another authority"])
async def test_a_stranger_cannot_write_answers_even_with_the_token(
    node: Tls, strangers: dict[str, Tls | None], certificate: str
) -> None:
    inbox, outlets = Inbox(HOST, tls=node, handshake_s=2), Outlets(strangers[certificate])
    await inbox.start()
    with inbox.open() as feed:
        with pytest.raises(ReplicaLost):
            # The server's refusal may come after the client believes to be connected: then the first word fails.
            await outlets.reach(feed.destination)
        assert feed._items == []
    await outlets.close()
    await inbox.stop()


async def test_a_gateway_that_only_claims_an_address_gets_no_answers(node: Tls, elsewhere: Tls) -> None:
    inbox, outlets = Inbox(HOST, tls=elsewhere), Outlets(node)
    await inbox.start()
    with inbox.open() as feed, pytest.raises(ReplicaLost, match="CERTIFICATE_VERIFY_FAILED"):
        await outlets.reach(feed.destination)
    await outlets.close()
    await inbox.stop()


def test_rays_variables_are_the_only_switch(node: Tls) -> None:
    files = {
        "RAY_TLS_SERVER_CERT": str(node.certificate),
        "RAY_TLS_SERVER_KEY": str(node.key),
        "RAY_TLS_CA_CERT": str(node.authority),
    }
    assert Tls.of_environment({}) is None
    assert Tls.of_environment({"RAY_USE_TLS": "0", **files}) is None
    assert Tls.of_environment({"RAY_USE_TLS": "1", **files}) == node
    with pytest.raises(InvalidConfiguration, match="RAY_USE_TLS is set, but RAY_TLS_CA_CERT is not"):
        Tls.of_environment({"RAY_USE_TLS": "True", **files, "RAY_TLS_CA_CERT": ""})


def test_files_that_cannot_be_used_are_named(node: Tls, tmp_path: Path) -> None:
    missing = replace(node, key=tmp_path / "none.key")
    with pytest.raises(InvalidConfiguration, match=r"none.key cannot be read: No such file"):
        missing.server_credentials()
    with pytest.raises(InvalidConfiguration, match=r"none.key .*cannot be used: .*No such file"):
        missing.client_context()
    assert node.server_context().verify_mode == ssl.CERT_REQUIRED
    assert node.client_context().check_hostname


def test_a_segment_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        segment = Segment(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(segment.path.stat().st_mode) == 0o600
    segment.withdraw()
