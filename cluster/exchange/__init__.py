"""The step protocol: work to a model replica, rows of logits back. It carries tensors and knows nothing of models.

A coordinator opens one bidirectional gRPC stream to each replica it uses (`StepStream.connect`); the replica's side of
all its streams is one `StepServer`, which hands every step to the `StepHandler` that it was given.

    coordinator                                  replica
    Hello{token, coordinator}         ->
                                      <-         Welcome{dtype, row width, path of a segment}
    MemoryProof{nonce}                ->                                                        with a segment only
                                      <-         Ready{number and size of slots}                with a segment only
    Step{id, slot, work}              ->
                                      <-         Result{id, rows or "in the slot", failures}
    Leave{sequence}                   ->                                                        a sequence has ended

**Shared memory.** The replica makes a file of one page in /dev/shm that begins with a nonce. A coordinator that can
read it back sees the same memory, whatever node or container it is in; the file is unlinked as soon as it has answered,
then grown to its slots through the open descriptor, so nothing is left behind, whoever dies. Each step names a free
slot; the replica writes the rows there, the coordinator reads them in place and frees the slot with `Rows.release`.

**Inline.** Rows travel in the Result when there are no slots, when none is free, or when the rows do not fit into one;
all but the last half megabyte of them go ahead as Parts.

**Order.** A stream's steps and leaves are handed to the handler in the order in which they were sent; results come in
any order.

**Who may.** A replica has a random token; a stream that does not show it is refused. With `Tls` both ends show
certificates before a byte of the above is said.

**Life.** What a replica holds for a coordinator belongs to the stream. However the stream ends, the handler's `detach`
is called once, after the last of the stream's calls to `step` has ended. A newer stream of the same coordinator
replaces the older one, which is detached first. Both ends ping each other, so a peer that is dead or frozen is found
within `keepalive_s`; a step whose answer is late is the business of its own `timeout_s`.

Messages are step.proto's. `messages` turns them into plain values and checks them, `segment` holds the shared memory,
`rows` turns tensors into bytes and `channel` has gRPC's settings. On the replica's side `attachment` is one stream and
`server` all of them; on the coordinator's, `stream` is one, begun by `handshake`, and `answer` what it brings.
"""

from cluster.exchange.answer import Rows
from cluster.exchange.messages import Failure, Step, StepHandler, StepRows, Work
from cluster.exchange.rows import Traffic
from cluster.exchange.server import StepServer
from cluster.exchange.stream import StepStream, Transport

__all__ = [
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
