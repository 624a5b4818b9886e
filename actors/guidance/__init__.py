"""The mathematics of guided generation, on plain tensors.

    merge        z = base logits + sum of weight * guide logits
    grammar      which tokens may come next
    shaping      penalties, biases and a least length, before temperature
    sampling     temperature, top-k, top-p and min-p
    noise        counter-based noise: the same seed and position give the same draw anywhere
    drawing      all of it for a step's rows, as the coordinator runs it: compiled
    lm_head      a model's hidden states to its logits
    vocabulary   which guides fit which base
    reference    the one-process loop that every other path must agree with, token by token

`kernels` and `filters` are behind `drawing`; the plain `merge`, `sampling` and `noise` are what the oracle runs.
Imports torch and nothing of Ray. Method: GenARM (arXiv 2410.08193), equation for p(y_t) in section 3.
"""

from actors.api import Sampling
from actors.guidance.merge import Guidance, Spelled, merge
from actors.guidance.vocabulary import Vocabulary, check_vocabulary

__all__ = ["Guidance", "Sampling", "Spelled", "Vocabulary", "check_vocabulary", "merge"]
