"""Inference lowering: `fuse`."""
