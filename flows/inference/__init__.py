"""A registered model over images: prediction and drift."""
