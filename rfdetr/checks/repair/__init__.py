"""Repaired copies of a dataset: `--fix`."""
