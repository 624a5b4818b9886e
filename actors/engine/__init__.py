"""The engine: a transformers model with a batched key-value cache. Append tokens, get logits, roll back.

Owns the model, its cache and the sequences in it. Knows nothing of Ray, guidance, requests or sampling.
"""

from actors.engine.engine import Engine
from actors.engine.plan import Work

__all__ = ["Engine", "Work"]
