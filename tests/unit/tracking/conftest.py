"""MLflow stores and servers for the tests of the journal."""

from tests.flows.mlflow_fixtures import migrated_database, mlflow_server, tracking_uri

__all__ = ["migrated_database", "mlflow_server", "tracking_uri"]
