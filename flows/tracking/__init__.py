"""The pipeline's part of MLflow tracking; the journal is in `rfdetr.tracking`."""
