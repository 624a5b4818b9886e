"""Models on GPUs: attention over the blocks of the cache in kernels of our own, and decode steps as recorded graphs.

Any architecture that transformers runs; only what its layers attend with is replaced.
"""
