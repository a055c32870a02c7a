"""Augmentation presets for `TrainConfig.aug_config`: Albumentations transforms by name.

The names are those of the public package, the values are our own.
"""

from __future__ import annotations

from typing import Any

AugConfig = dict[str, dict[str, Any]]

AUG_CONFIG: AugConfig = {"HorizontalFlip": {"p": 0.5}}
AUG_CONSERVATIVE: AugConfig = {
    "HorizontalFlip": {"p": 0.5},
    "RandomBrightnessContrast": {"brightness_limit": 0.1, "contrast_limit": 0.1, "p": 0.3},
}
AUG_AGGRESSIVE: AugConfig = {
    "HorizontalFlip": {"p": 0.5},
    "VerticalFlip": {"p": 0.5},
    "Rotate": {"limit": 30, "p": 0.5},
    "ColorJitter": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1, "p": 0.5},
}
AUG_AERIAL: AugConfig = {  # no direction is up
    "HorizontalFlip": {"p": 0.5},
    "VerticalFlip": {"p": 0.5},
    "Rotate": {"limit": 90, "p": 0.5},
    "RandomBrightnessContrast": {"brightness_limit": 0.15, "contrast_limit": 0.15, "p": 0.5},
}
AUG_INDUSTRIAL: AugConfig = {  # fixed cameras, changing light and focus
    "RandomBrightnessContrast": {"brightness_limit": 0.2, "contrast_limit": 0.2, "p": 0.5},
    "GaussianBlur": {"blur_limit": (3, 5), "p": 0.2},
    "GaussNoise": {"p": 0.2},
}
