"""Typed schema of every config group, composition and validation. Never imports torch or Megatron."""
