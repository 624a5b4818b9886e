"""Who may use the service over HTTP, and what a request may be before anything reads it.

`keys` holds the API keys, `exposure` finds out who can reach this machine's HTTP port, `body` reads what a client sends
within its limits, and `guard` stands before the gateway's application with all three. What a key may use is counted by
the coordinator (`actors.coordinator.admission`), so that it holds whichever gateway a request comes through.
"""
