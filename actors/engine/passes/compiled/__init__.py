"""Forward passes for processors, compiled when they are first used: of whole decoders, and of single products."""
