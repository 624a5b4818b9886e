"""What a client reads of an error that Ray carried."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from cluster.errors import InvalidRequest, ReplicaLost, in_brief

TRACEBACK = """\x1b[36mray::ServeReplica:trimtab-base:BaseModel.lease()\x1b[39m (pid=4711, ip=10.0.0.5, actor_id=5f0c)
Traceback (most recent call last):
  File "/srv/trimtab/actors/replica/server.py", line 202, in lease
    tokens = self._encoder.encode(request.prompt)
OSError: [Errno 98] address already in use"""
DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: ServeReplica
\tactor_id: 5f0c
\tpid: 4711
\tip: 10.0.0.5"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RayTaskError("lease", TRACEBACK, OSError(98, "address already in use")), "[Errno 98] address already in use"),
        (RayTaskError("lease", TRACEBACK, InvalidRequest("prompt is empty", "prompt")), "prompt is empty"),
        (RayTaskError("lease", TRACEBACK, RuntimeError(TRACEBACK)), "OSError: [Errno 98] address already in use"),
        (RuntimeError(DIED), "The actor died unexpectedly before finishing this task."),
        (GetTimeoutError("timed out"), "timed out"),
        (ReplicaLost("a\nb"), "a\nb"),
        (StopAsyncIteration(), "StopAsyncIteration"),
    ],
)
def test_an_error_is_told_in_its_own_words(error: BaseException, words: str) -> None:
    assert in_brief(error) == words


DEATH = ActorDiedErrorContext(
    actor_id=bytes(16), class_name="ServeReplica", pid=4711, node_ip_address="10.0.0.5", error_message="Killed."
)


@pytest.mark.parametrize("error", [ActorDiedError(DEATH), ActorUnavailableError("it is away", None), ActorDiedError()])
def test_nothing_of_a_process_is_told(error: Exception) -> None:
    told = in_brief(error)
    assert "4711" not in told
    assert "10.0.0.5" not in told
    assert "\n" not in told
