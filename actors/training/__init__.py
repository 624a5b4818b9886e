"""How a guide is made: preferences out of answers, small models out of large ones, and the objectives that teach them.

    preferences   answers sampled from a model, and pairs of them ranked by a reward
    rewards       the rewards that ship, and how users name their own
    data          examples out of rows; data_sources finds the rows, data_formats is the table of what one may hold
    encoding      examples as tokens, and the order in which a run takes them
    derive, soup  a cut of a model to some of its layers, LoRA adapters; the average of several models
    objective     the ARM, DPO and distillation losses on logits at response positions only
    trainer, run  transformers' trainer with these objectives; one run, as each of its workers sees it
    card          the model card

Imports torch and transformers and nothing of Ray. Method: GenARM (arXiv 2410.08193), section 3.
"""
