"""Hugging Face's `nemotron` folders: names, order and shapes of the weights, configuration, tokenizer, reward head."""
