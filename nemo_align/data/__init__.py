"""From rows on disk to batches: tokenizer, chat template, row formats, caches, sampler, step plan. Knows no model."""
