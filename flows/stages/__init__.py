"""What DVC runs: `python -m flows.stages.<name>`."""
