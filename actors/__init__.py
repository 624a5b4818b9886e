"""What computes: the engine and its actors, the guidance, the coordinator, and the training of guides."""
