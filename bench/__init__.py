"""Measurements of speed and memory. Nothing here is asserted, and nothing of the service imports it.

make bench                  the service and the bare engine beside transformers `generate`, and where a step's time goes
python -m bench.exchange    a step without a model
python -m bench.streams     processor time that a streamed token costs on its way to the client
python -m bench.memory      resident memory after few and after many requests
python -m bench.gpu         the engine's decode step with random weights of real sizes, on a GPU
"""
