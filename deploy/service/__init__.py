"""A deploy.yaml and the machine that it starts on: what is checked before anything loads a model."""
