"""The service over HTTP: OpenAI's API in, answers and errors out. Holds no model."""
