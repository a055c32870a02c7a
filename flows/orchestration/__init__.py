"""What the Prefect flows share: limits, GPUs, child processes, artifacts, notifications."""
