from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Request(_message.Message):
    __slots__ = ("hello", "proof", "step", "leave")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    proof: MemoryProof
    step: Step
    leave: Leave
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., proof: _Optional[_Union[MemoryProof, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "coordinator", "token", "offers_shared_memory")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    OFFERS_SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    version: int
    coordinator: str
    token: str
    offers_shared_memory: bool
    def __init__(self, version: _Optional[int] = ..., coordinator: _Optional[str] = ..., token: _Optional[str] = ..., offers_shared_memory: _Optional[bool] = ...) -> None: ...

class MemoryProof(_message.Message):
    __slots__ = ("nonce", "obstacle")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    OBSTACLE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    obstacle: str
    def __init__(self, nonce: _Optional[bytes] = ..., obstacle: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("id", "slot", "work")
    ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    id: int
    slot: int
    work: _containers.RepeatedCompositeFieldContainer[Work]
    def __init__(self, id: _Optional[int] = ..., slot: _Optional[int] = ..., work: _Optional[_Iterable[_Union[Work, _Mapping]]] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("sequence", "length", "tokens", "rows")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    length: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence: _Optional[str] = ..., length: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    def __init__(self, sequence: _Optional[str] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("welcome", "ready", "result", "part")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    ready: Ready
    result: Result
    part: Part
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("dtype", "row_width", "segment", "obstacle")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROW_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OBSTACLE_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    row_width: int
    segment: str
    obstacle: str
    def __init__(self, dtype: _Optional[str] = ..., row_width: _Optional[int] = ..., segment: _Optional[str] = ..., obstacle: _Optional[str] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("num_slots", "slot_bytes", "first_slot", "obstacle")
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    OBSTACLE_FIELD_NUMBER: _ClassVar[int]
    num_slots: int
    slot_bytes: int
    first_slot: int
    obstacle: str
    def __init__(self, num_slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., first_slot: _Optional[int] = ..., obstacle: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("id", "num_rows", "in_slot", "rows", "failures", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    IN_SLOT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    num_rows: int
    in_slot: bool
    rows: bytes
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    error: str
    def __init__(self, id: _Optional[int] = ..., num_rows: _Optional[int] = ..., in_slot: _Optional[bool] = ..., rows: _Optional[bytes] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("id", "rows")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    id: int
    rows: bytes
    def __init__(self, id: _Optional[int] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("sequence", "kind", "message")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    kind: str
    message: str
    def __init__(self, sequence: _Optional[str] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
