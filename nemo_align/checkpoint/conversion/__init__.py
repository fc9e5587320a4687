"""Checkpoints from one format to another, tensor by tensor in bounded memory: `convert`, `merge` and `inspect`."""
