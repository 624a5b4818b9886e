"""One replica of a model as Serve runs it, its ranks, and the router that leads leases to it."""
