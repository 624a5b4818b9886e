"""Messages and rows as bytes."""

import pytest
import torch

from cluster.exchange import Failure, Step, Work, step_pb2
from cluster.exchange.messages import (
    PART_BYTES,
    Malformed,
    decode_reply,
    decode_request,
    decode_step,
    encode_rows,
    encode_step,
)
from cluster.exchange.rows import DTYPES, IncomingRows, RowFormat


def test_a_step_survives_its_message() -> None:
    step = Step((Work("a", 3, (0, 2**32 - 1), (1, 0)), Work("ü", 0, (1,))))
    message = decode_request(encode_step(2**40, -1, step)).step
    assert (message.id, message.slot) == (2**40, -1)
    assert decode_step(message) == step


@pytest.mark.parametrize("num_rows", [0, 1, 3, 6000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_survive_their_messages(num_rows: int, dtype: torch.dtype) -> None:
    row_format = RowFormat(dtype, 101)
    rows_RW = torch.randn(num_rows, 202).to(dtype)[:, ::2]
    result = step_pb2.Result(id=9, num_rows=num_rows, failures=[step_pb2.Failure(sequence="s")])
    messages = list(encode_rows(step_pb2.Reply(result=result), row_format.encode(rows_RW)))
    assert all(len(message) < PART_BYTES + 100 for message in messages)
    incoming = IncomingRows(row_format, num_rows)
    *parts, last = map(decode_reply, messages)
    for reply in parts:
        assert reply.part.id == 9
        incoming.add(reply.part.rows)
    incoming.add(last.result.rows)
    assert torch.equal(incoming.finish(num_rows), rows_RW)
    last.result.ClearField("rows")
    assert last == step_pb2.Reply(result=result)


def test_bytes_that_are_no_rows_are_refused() -> None:
    incoming = IncomingRows(RowFormat(torch.float32, 2), 2)
    incoming.add(bytes(7))
    with pytest.raises(ValueError, match="7 bytes for 1 rows of 8 bytes"):
        incoming.finish(1)
    with pytest.raises(ValueError, match="17 bytes of rows, of which there may be 16"):
        incoming.add(bytes(10))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x1a\x7f"])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        decode_request(data)
    with pytest.raises(Malformed):
        decode_reply(data)


def test_public_names() -> None:
    import cluster.exchange

    assert Failure("s", "kind", "message").kind == "kind"
    assert sorted(cluster.exchange.__all__) == [
        "Failure",
        "Rows",
        "Step",
        "StepHandler",
        "StepRows",
        "StepServer",
        "StepStream",
        "Traffic",
        "Transport",
        "Work",
    ]
