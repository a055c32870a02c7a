"""The network, its losses, and post-processing. docs/model.md describes what they compute."""
