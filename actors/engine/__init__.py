"""The engine: a transformers model with a batched key-value cache. Append tokens, get logits, roll back.

Owns the model, its cache and the sequences in it, and decides what runs in a pass when not all fits. Knows nothing of
Ray, guidance, requests or sampling.
"""

from actors.engine.engine import Counters, Engine
from actors.engine.output import RowKind
from actors.engine.plan import Work
from actors.engine.schedule import Schedule, Task, gather_rows

__all__ = ["Counters", "Engine", "RowKind", "Schedule", "Task", "Work", "gather_rows"]
