"""The retraining pipeline: DVC stages, the Prefect flow, the MLflow registry."""
