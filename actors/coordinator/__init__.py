"""The hot loop of guided generation.

request      what a caller may ask for
replicas     leases on model replicas and the streams to them
hangs        replicas that hang are found and killed
presence     which models have a replica that runs
outputs      logits out of the rows of guides that send hidden states
sequence     one answer: its voices (models), tokens and text
plan         who runs in the next step
lane         the loop: plan, scatter, gather, merge, draw, commit
tenancy      a sequence's places on replicas, taken at its start and again when one is lost
text         tokens to text, stop strings
coordinator  the Serve deployment around them
"""
