"""Tensors that are read from one set of files and written to another a slab of rows at a time, never whole."""
