"""MLflow tracking that never blocks or ends a training: a durable journal, its sender, the logger.

`journal` writes records to disk, `delivery` brings them to MLflow, `sender` does so in the
background, `mlflow_logger` is the Lightning logger on top.
"""
