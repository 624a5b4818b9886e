"""Telling whether two replicas hold the same model."""

import hashlib

from torch import Tensor
from transformers import PreTrainedModel

from actors.engine.models.sharding import elements

NUM_SAMPLES = 1024
"""Elements of each weight that count."""


def fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of a model's configuration, dtype and a sample of every weight.

    Two replicas with the same fingerprint compute the same, whatever directory each was loaded from and over however
    many ranks each is sharded; the ranks of one must call this together.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    settings = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "distributed_config"):
        settings.pop(volatile, None)
    digest.update(repr(sorted(settings.items(), key=lambda item: item[0])).encode())
    for name, weight in sorted(model.state_dict().items()):
        sample: Tensor = elements(weight.detach(), max(1, weight.numel() // NUM_SAMPLES)).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
