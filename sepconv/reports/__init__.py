"""What `convert` and `fuse` did, layer by layer."""
