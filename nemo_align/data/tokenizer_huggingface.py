"""Hugging Face tokenizer folders (fast tokenizers). Code from a folder is never run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_align.data.sentencepiece_model import CONTROL_TOKEN
from nemo_align.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer, choose_pad_id, split_at_control


class HuggingFaceTokenizer(Tokenizer):
    """AutoTokenizer of a folder on disk; texts are encoded by copies of its backend that know no special tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # slow to import, and SentencePiece users do not need it

        self.source = str(folder)
        self._folder = Path(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a folder that is not a tokenizer
            raise ValueError(f"data.tokenizer: transformers cannot load {folder}: {error}") from error
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"data.tokenizer: {folder} has no fast tokenizer (tokenizer.json); name its SentencePiece file"
            )
        added = {
            token_id: token for token_id, token in self._tokenizer.added_tokens_decoder.items() if _is_control(token)
        }
        self._control_ids = {token.content: token_id for token_id, token in added.items()}
        for name, token_id in self._tokenizer.get_vocab().items():
            if CONTROL_TOKEN.fullmatch(name):
                self._control_ids[name] = token_id
        unknown = self._tokenizer.unk_token_id  # text may contain it where the vocabulary has no bytes
        self._control = frozenset(self._control_ids.values()) - {unknown}
        self._control_ids = {
            name: token_id for name, token_id in self._control_ids.items() if token_id in self._control
        }
        definition = json.loads(self._tokenizer.backend_tokenizer.to_str())
        self._text = _text_backend(definition)
        self._continuation = _text_backend(_without_prefix_space(definition))
        self.vocab_size = len(self._tokenizer)
        canonical = json.dumps(definition, sort_keys=True, ensure_ascii=False)
        self.fingerprint = hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        for name in ("</s>", "<|endoftext|>"):
            if self.eos_id is None:
                self.eos_id = self._control_ids.get(name)
        taken = {unknown, self.eos_id} | {self._control_ids.get(f"<extra_id_{n}>") for n in range(3)}
        own = self._tokenizer.pad_token_id
        self.pad_id = choose_pad_id(own, self._control_ids, taken=taken, bos_id=self.bos_id, source=self.source)

    def encode_text(self, text: str) -> list[int]:
        return self._encode(self._text, text)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode(self._continuation, text)

    def _encode(self, backend: Any, text: str) -> list[int]:
        """Ids of `text`; where the vocabulary itself still matched a control token, the text is cut inside it."""
        encoding = backend.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._control:
                if end - start < 2:
                    raise ValueError(
                        f"tokenizer {self.source}: the text {text[start:end]!r} is control token "
                        f"{self.token_name(token_id)} and cannot be written otherwise; remove it from the rows"
                    )
                cut = start + 1
                return self._encode(backend, text[:cut]) + self._encode(self._continuation, text[cut:])
        return list(encoding.ids)

    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        parts = []
        # Only a text at the very start has the model's extra space, which decoding takes away again.
        backend = self._text
        for is_control, run in split_at_control([int(token_id) for token_id in ids], self._control):
            if not is_control:
                parts.append(backend.decode(run, skip_special_tokens=False))
            elif not skip_control:
                parts.extend(self.token_name(token_id) for token_id in run)
            backend = self._continuation
        return "".join(parts)

    def find_control_id(self, name: str) -> int | None:
        return self._control_ids.get(name)

    def token_name(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(int(token_id))

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder))
        # transformers 5 writes tokenizer.json alone; other programs read the SentencePiece file of the same vocabulary.
        model = self._folder / SENTENCEPIECE_FILE
        if model.is_file() and _is_sentencepiece(content := model.read_bytes()):
            (Path(folder) / SENTENCEPIECE_FILE).write_bytes(content)


def _is_sentencepiece(content: bytes) -> bool:
    """Whether it is a vocabulary; a link may lead to any file, and that must not travel with the checkpoint."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size() > 0
    except (ValueError, RuntimeError):
        return False


def _is_control(token: Any) -> bool:
    return token.special or CONTROL_TOKEN.fullmatch(token.content) is not None


def _text_backend(definition: dict[str, Any]) -> Any:
    """A copy that matches no special token in text; tokens added without `special` count as such if they look so."""
    from tokenizers import Tokenizer as Backend

    copy = json.loads(json.dumps(definition))
    for token in copy["added_tokens"]:
        token["special"] = token["special"] or CONTROL_TOKEN.fullmatch(token["content"]) is not None
    copy["truncation"] = copy["padding"] = None
    backend = Backend.from_str(json.dumps(copy))
    backend.encode_special_tokens = True
    return backend


def _without_prefix_space(node: Any) -> Any:
    """The definition with no step that puts a space before a text, or takes it away in decoding."""
    if isinstance(node, list):
        return [_without_prefix_space(part) for part in node if not _is_prefix_step(part)]
    if not isinstance(node, dict):
        return node
    changed = {}
    for key, value in node.items():
        if key in ("model", "added_tokens"):
            changed[key] = value
        elif _is_prefix_step(value):
            changed[key] = None
        else:
            changed[key] = _without_prefix_space(value)
    if node.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if node.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


def _is_prefix_step(node: Any) -> bool:
    """A normaliser that prepends, or a decoder that strips what was prepended."""
    return isinstance(node, dict) and (
        node.get("type") == "Prepend" or (node.get("type") == "Strip" and node.get("content") == " ")
    )
