"""The MLflow model registry and what is stored with a version."""
