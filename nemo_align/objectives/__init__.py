"""Losses and metrics as plain functions of tensors."""
