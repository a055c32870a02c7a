"""Augmentation presets under the import path of the public package."""
