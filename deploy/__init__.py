"""How people reach it: Serve applications, HTTP, the Python client, and jobs."""
