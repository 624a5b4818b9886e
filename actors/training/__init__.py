"""How a guide is made: small models derived from a base, and the objective that turns one into a reward model.

    preferences  answers sampled from a model, and pairs of them ranked by a reward
    derive       a cut of a model to some of its layers, and LoRA adapters
    objective    the ARM loss, the distillation loss, and logits at response positions only
    fit          the optimisation loop

Imports torch and transformers and nothing of Ray. Method: GenARM (arXiv 2410.08193), section 3.
"""
