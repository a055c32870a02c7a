"""Copies of a network for inference elsewhere: ONNX files and frozen PyTorch modules."""
