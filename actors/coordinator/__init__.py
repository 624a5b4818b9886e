"""The hot loop of guided generation.

request      what a caller may ask for
replicas     leases on model replicas and the streams to them
outputs      logits out of the rows of guides that send hidden states
sequence     one answer: its voices (models), tokens and text
plan         who runs in the next step
lane         the loop: plan, scatter, gather, merge, draw, commit
text         tokens to text, stop strings
coordinator  the Serve deployment around them
"""
