"""The tokenizer of an export: the SentencePiece file and the same vocabulary as a fast tokenizer for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nemo_align.checkpoint.huggingface.sentencepiece_rules import read_rules
from nemo_align.data.chat_template import CHAT_TEMPLATE_JINJA, REWARD_CHAT_TEMPLATE_JINJA
from nemo_align.data.sentencepiece_model import CONTROL_TOKEN
from nemo_align.data.tokenizer import SENTENCEPIECE_FILE, load_tokenizer
from nemo_align.data.tokenizer import Tokenizer as OurTokenizer
from nemo_align.data.tokenizer_sentencepiece import SentencePieceTokenizer

SPACE = "\u2581"  # how SentencePiece writes a space
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# What a tokenizer's folder may hand on to an export: vocabularies and settings, never code or pickles.
_COPIED = (".json", ".model", ".txt")
# In a model's folder these stand beside it and are not the tokenizer's.
_OF_THE_MODEL = ("config.json", "generation_config.json", "conversion.json", "manifest.json")


def write_tokenizer(source: Path, target: Path, *, is_reward: bool, max_length: int) -> OurTokenizer:
    """Copy the tokenizer folder `source` into `target` and add what transformers needs; returns the tokenizer.

    A tokenizer that is Hugging Face's already is copied as it is, with our chat template.
    """
    tokenizer = load_tokenizer(source)
    for path in sorted(source.iterdir()):
        is_weights = path.name.endswith(".index.json") or path.name in _OF_THE_MODEL
        if path.suffix in _COPIED and path.is_file() and not is_weights:
            if path.is_symlink():  # what lies elsewhere on this machine must not be published with the model
                raise ValueError(f"{path} is a link; put the file itself there")
            shutil.copyfile(path, target / path.name)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(target)  # marks it as such: beside tokenizer.json the file would not be read again
    template = REWARD_CHAT_TEMPLATE_JINJA if is_reward else CHAT_TEMPLATE_JINJA
    (target / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    _ours_alone(target / "tokenizer_config.json", template)
    if (target / "tokenizer.json").exists():
        return tokenizer
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source / SENTENCEPIECE_FILE))
    fast = fast_tokenizer((source / SENTENCEPIECE_FILE).read_bytes())
    fast.save(str(target / "tokenizer.json"))

    def named(token_id: int | None) -> str | None:
        return None if token_id is None or token_id < 0 else processor.id_to_piece(token_id)

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # any transformers version then takes tokenizer.json as it is
        "model_max_length": max_length,
        "bos_token": named(tokenizer.bos_id),
        "eos_token": named(tokenizer.eos_id),
        "unk_token": named(processor.unk_id()),
        "pad_token": named(tokenizer.pad_id),
        "padding_side": "right" if is_reward else "left",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": template,
    }
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2, ensure_ascii=False)
    (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return tokenizer


def _ours_alone(config: Path, template: str) -> None:
    """Take out of a tokenizer_config.json what names code to run, and put our chat template in place of its own."""
    if not config.is_file():
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("auto_map", None)
    values["chat_template"] = template
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fast_tokenizer(model: bytes) -> Tokenizer:
    """The SentencePiece model (BPE or unigram) as a `tokenizers` tokenizer with the same ids for plain text.

    One difference is out of reach of its building blocks: where the model puts a space before every text and squeezes
    none, a text that begins with spaces gets one fewer.

    Control tokens (`<s>`, `<extra_id_1>`, ...) are special: recognised where they are spelled out, as chat templates
    need, and left out by `skip_special_tokens`.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(token_id) for token_id in range(processor.vocab_size())]
    rules = read_rules(model)
    has_bytes = any(processor.is_byte(token_id) for token_id in range(len(pieces)))
    ordinary = {
        piece: token_id
        for token_id, piece in enumerate(pieces)
        if (token_id not in rules.user_defined or SPACE in piece)
        and not (processor.is_control(token_id) or processor.is_unknown(token_id) or processor.is_byte(token_id))
    }
    if rules.is_unigram:
        scores = [(piece, processor.get_score(token_id)) for token_id, piece in enumerate(pieces)]
        backend = models.Unigram(scores, unk_id=processor.unk_id(), byte_fallback=has_bytes)
    else:
        backend = models.BPE(
            vocab={piece: token_id for token_id, piece in enumerate(pieces)},
            merges=_merges(ordinary, processor),
            unk_token=pieces[processor.unk_id()],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    tokenizer = Tokenizer(backend)
    steps = [normalizers.Precompiled(rules.character_map)] if rules.character_map else []
    if rules.removes_extra_spaces:
        # Where a space goes before the text, the one that is left of leading spaces is that space.
        steps += [
            normalizers.Strip(left=not rules.adds_space_before, right=True),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    # "first": a space before the very start of a text, none after a special token, where a turn's text continues.
    scheme = "first" if rules.adds_space_before else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.adds_space_before:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    _add_tokens(tokenizer, processor, pieces, rules.user_defined)
    return tokenizer


def _merges(ordinary: dict[str, int], processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Merge rules from the pieces: a piece may arise from every pair of pieces that spell it, better pieces first."""
    found = []
    for piece, token_id in ordinary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ordinary and right in ordinary:
                found.append((-processor.get_score(token_id), token_id, ordinary[left], ordinary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(
    tokenizer: Tokenizer,
    processor: sentencepiece.SentencePieceProcessor,
    pieces: list[str],
    user_defined: frozenset[int],
) -> None:
    """Mark the tokens that are never cut: control tokens as special, other user-defined pieces as plain."""
    special, plain = [], []
    for token_id, piece in enumerate(pieces):
        is_template_token = token_id in user_defined and CONTROL_TOKEN.fullmatch(piece)
        if processor.is_control(token_id) or processor.is_unknown(token_id) or is_template_token:
            special.append(AddedToken(piece, normalized=False, special=True))
        elif token_id in user_defined and SPACE not in piece and " " not in piece:
            # Runs of spaces arise from merges instead: the text that is searched for these still has plain spaces.
            plain.append(AddedToken(piece, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    assert all(tokenizer.token_to_id(token.content) == pieces.index(token.content) for token in (*special, *plain))
