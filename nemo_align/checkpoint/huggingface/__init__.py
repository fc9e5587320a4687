"""Conversion to and from Hugging Face's `nemotron`: export, import into a model, config, and the `convert` verb."""

from nemo_align.checkpoint.huggingface.convert import convert
from nemo_align.checkpoint.huggingface.export import export_hf
from nemo_align.checkpoint.huggingface.load import load_hf_weights
from nemo_align.config.hf_model import hf_model_config, hf_reward_config

__all__ = ["convert", "export_hf", "hf_model_config", "hf_reward_config", "load_hf_weights"]
