"""What each command may be told: frozen values that typer fills from the command line. Imports nothing large."""
