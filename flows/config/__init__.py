"""params.yaml, overrides, batch plan, environment variables."""
