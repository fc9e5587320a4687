"""Whether a server that encodes a rendered dialogue as one text gives the model the tokens it was trained on.

Training encodes role names, newlines and texts one by one (data/chat_template.py). A vocabulary with pieces such as
"\\n\\n" or ".\\n" joins them when the whole text is encoded, as transformers and inference servers do: from the first
newline on, the model reads tokens that it never saw there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from nemo_align.data.chat import Message
from nemo_align.data.chat_template import ChatTemplate, render_text
from nemo_align.data.tokenizer import Tokenizer

# An empty system turn puts two newlines side by side in nearly every prompt; the others end and begin as texts do.
_PROBES = (
    ("", "Hi", "Hello."),
    ("Be brief.", "What is 3 + 3?", "It is 6."),
    ("You are (very) helpful!", "x = [1, 2]\n", "\n- one\n- two"),
    ("\n", " a\n\n", "    return {}\n"),
)

REMEDY = (
    "Encode role names, newlines and texts one by one, as `nemo_align.data.chat_template.render_generation_prompt` "
    "does, and give the server token ids"
)


def joins_across_turns(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether `folder`/tokenizer.json encodes some probing dialogue otherwise than training does.

    False for a vocabulary that cannot carry the template: its models do not chat.
    """
    try:
        template = ChatTemplate(tokenizer)
    except ValueError:
        return False
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))

    def differs(messages: Sequence[Message]) -> bool:
        ours, _ = template.dialogue(template.turns(messages))
        return fast.encode(render_text(messages), add_special_tokens=False).ids != ours

    return any(
        differs([Message("system", system), Message("user", user), Message("assistant", assistant)])
        for system, user, assistant in _PROBES
    )
