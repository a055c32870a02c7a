"""Image profiles and drift."""
