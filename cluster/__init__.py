"""Where actors run and how bytes travel; knows nothing of models."""
