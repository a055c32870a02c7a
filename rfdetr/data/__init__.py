"""Datasets: layouts, readers, transforms, batches, and the demo dataset."""
