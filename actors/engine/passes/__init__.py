"""Forward passes: what a step computes, in transformers' modules, compiled, or on a GPU."""
