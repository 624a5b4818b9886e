"""The engine: a transformers model with a batched key-value cache. Append tokens, get logits, roll back.

Owns the model, its cache and the sequences in it, and decides what runs in a pass when not all fits. Knows nothing of
Ray, guidance, requests or sampling.
"""

from actors.engine.engine import Counters, Engine
from actors.engine.models.lm_head import RowKind
from actors.engine.schedule import Schedule, Task, gather_rows
from actors.engine.work import Work

__all__ = ["Counters", "Engine", "RowKind", "Schedule", "Task", "Work", "gather_rows"]
