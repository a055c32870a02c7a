"""What the stage `fit` and its trainer processes share: job, worker, resume state, its copy."""
