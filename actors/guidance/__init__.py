"""The mathematics of guided generation, on plain tensors.

    merge        z = base logits + sum of weight * guide logits
    sampling     temperature, top-k, top-p, min-p, and the Gumbel-max draw
    noise        counter-based noise: the same seed and position give the same draw anywhere
    vocabulary   which guides fit which base
    reference    the one-process loop that every other path must agree with, token by token

Imports torch and nothing of Ray. Method: GenARM (arXiv 2410.08193), equation for p(y_t) in section 3.
"""

from actors.guidance.merge import Guidance, merge
from actors.guidance.sampling import Sampling, draw
from actors.guidance.vocabulary import Vocabulary, check_vocabulary

__all__ = ["Guidance", "Sampling", "Vocabulary", "check_vocabulary", "draw", "merge"]
