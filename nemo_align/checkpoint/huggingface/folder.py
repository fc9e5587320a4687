"""The tensors of a Hugging Face folder under Megatron-core's names."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_align.checkpoint.huggingface import qkv, reward_head
from nemo_align.checkpoint.huggingface.weight_map import FINAL_NORM_BIAS, HEAD_WEIGHT, QKV, SCORE, Weight, weight_map
from nemo_align.checkpoint.streaming.safetensors import SafetensorsFolder
from nemo_align.checkpoint.streaming.tensors import HeldTensor, RowSource, StoredTensor
from nemo_align.config.hf_model import hf_reward_config
from nemo_align.config.model import ModelConfig
from nemo_align.model.counts import head_dim

_NORM_BIAS = "model.norm.bias"
_NAMED = 6  # tensors in an error


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder: `tensors` maps Megatron-core's names, without vocabulary padding.

    Raises ValueError on tensors that are missing, unexpected or of another shape than config.json says.
    """

    def __init__(self, folder: Path, model: ModelConfig, *, with_output_layer: bool) -> None:
        self.folder, self.model = folder, model
        self.files = SafetensorsFolder(folder)
        self.has_head = SCORE in self.files.names()
        if with_output_layer and self.has_head:
            raise ValueError(f"{folder} is a reward model: it has no output layer to start a policy from")
        self.weights = {weight.megatron: weight for weight in weight_map(model, has_output_layer=with_output_layer)}
        self.reward = hf_reward_config(folder)
        self._check()
        self._kept = self._find_kept_head()
        self.tensors: dict[str, RowSource] = {key: self._source(weight) for key, weight in self.weights.items()}

    def head(self, key: str) -> RowSource:
        """reward_head.weight or reward_head.bias, as trained where we know it."""
        if key == HEAD_WEIGHT:
            return self._kept.get(reward_head.WEIGHT) or self.files.stored(SCORE)
        return self._kept.get(reward_head.BIAS) or HeldTensor(torch.zeros(self.files.shape(SCORE)[0]))

    def _source(self, weight: Weight) -> RowSource:
        if weight.megatron == FINAL_NORM_BIAS and reward_head.NORM_BIAS in self._kept:
            return self._kept[reward_head.NORM_BIAS]  # before the head's bias was folded in
        parts = [self.files.stored(name) for name in weight.hf]
        if weight.how == QKV:
            return qkv.group(*parts, num_groups=self.model.num_query_groups, head_dim=head_dim(self.model))
        return parts[0]

    def _find_kept_head(self) -> dict[str, StoredTensor]:
        if not (self.has_head and (self.folder / reward_head.HEAD_FILE).is_file()):
            return {}
        kept = SafetensorsFolder(self.folder, single=reward_head.HEAD_FILE)
        attributes, hidden = self.files.shape(SCORE)
        shapes = {
            reward_head.WEIGHT: (attributes, hidden),
            reward_head.NORM_BIAS: (hidden,),
            reward_head.BIAS: (attributes,),
        }
        missing = {reward_head.WEIGHT, reward_head.NORM_BIAS} - kept.names()
        if self.reward is not None and not self.reward.head_bias:
            shapes.pop(reward_head.BIAS)  # it was folded in, so leaving it out would change the scores
        wrong = [name for name in kept.names() if shapes.get(name) != kept.shape(name)]
        if not (missing or wrong):
            wrong = reward_head.differences(
                {name: kept.read(name) for name in kept.names()}, self.files.read(SCORE), self.files.read(_NORM_BIAS)
            )
        if missing or wrong:
            raise ValueError(
                f"{self.folder / reward_head.HEAD_FILE} is not that of this model "
                f"({', '.join(sorted([*missing, *wrong]))}): remove it to take {SCORE} as the head"
            )
        return {name: kept.stored(name) for name in kept.names()}

    def _check(self) -> None:
        expected = {
            name: shape
            for weight in self.weights.values()
            for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
        }
        stored = self.files.names()
        if self.reward is not None:
            expected[SCORE] = (len(self.reward.attributes), self.model.hidden_size)
        elif self.has_head:  # of a class that config.json does not name: its rows may be any number
            expected[SCORE] = (*self.files.shape(SCORE)[:1], self.model.hidden_size)
        # A reward model that starts from a policy leaves its output layer; older files store the rotary frequencies.
        ignored = {SCORE, "lm_head.weight"} | {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        problems = []
        if missing := sorted(expected.keys() - stored):
            problems.append(f"missing: {', '.join(missing[:_NAMED])} ({len(missing)} in all)")
        if left := sorted(stored - expected.keys() - ignored):
            problems.append(f"unexpected: {', '.join(left[:_NAMED])} ({len(left)} in all)")
        for name in sorted(expected.keys() & stored):
            if (found := self.files.shape(name)) != expected[name]:
                problems.append(f"{name} has shape {list(found)}, config.json means {list(expected[name])}")
        formats = {self.files.dtype(name) for name in expected.keys() & stored if "norm" not in name and name != SCORE}
        if len(formats) > 1:
            problems.append(f"its weights mix the number formats {', '.join(sorted(formats))}")
        if problems:
            raise ValueError(
                f"{self.folder} does not hold the model that its config.json describes: {'; '.join(problems[:8])}"
            )
