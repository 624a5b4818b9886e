"""Chaos: steady load on a service whose processes are killed, stopped and drained, and clients that leave.

load     requests over HTTP, what came of each, and for how long it stood still
faults   what is done to the service, and how long that lasts
traces   what requests leave behind in the service's processes
"""
