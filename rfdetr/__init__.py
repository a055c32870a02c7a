"""RF-DETR detection and instance segmentation with a retraining pipeline around it."""
