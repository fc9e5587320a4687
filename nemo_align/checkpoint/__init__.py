"""Checkpoints: Megatron's distributed format with our manifest, and conversion to and from Hugging Face."""
