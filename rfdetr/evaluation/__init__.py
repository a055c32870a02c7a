"""COCO metrics of detections, the F1 sweep, confusion, bootstrap, plots."""
