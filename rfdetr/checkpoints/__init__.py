"""Everything that reads, writes, converts and adapts weights.

Reading and writing
    `safe_io`           torch files (`.pth`, `.ckpt`): never runs code from them, writes atomically
    `record`            a checkpoint of any generation as one `CheckpointRecord`
    `best_file`         what the best `.pth` files of a training contain
    `lightning_io`      the plugin through which Lightning reads and writes checkpoints
Using weights
    `pretrained`        fills a network with a checkpoint, published weights or DINOv2
    `download`, `dinov2`  get published detectors and encoders from the network
    `structure`         which network and configuration a checkpoint belongs to
    `adapt`             resizes class head, queries and position table to a configuration
Converting
    `convert`           a legacy checkpoint as one that Lightning resumes from
    `conversion_proof`  evidence that the converted file computes the same
    `legacy_names`      tensor names here and in legacy files
"""
