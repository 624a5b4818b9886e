"""What a service of a given size needs and reaches, by arithmetic: models and hardware in, estimates out.

It reads model configurations and no weights, and starts nothing. `trimtab plan` is its command.
"""
