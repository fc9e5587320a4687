"""The Nemotron chat template, rendered as token ids.

    <extra_id_0>System\n{system}\n<extra_id_1>User\n{text}\n<extra_id_1>Assistant\n{text}\n<extra_id_1>User\n...

Names, newlines and texts are tokenized one by one, so a newline never merges with its neighbour: the tokens of a prompt
are a prefix of the tokens of prompt and response, and the prompt at training is the prompt at generation.

The loss is on what the model must write: the text of an assistant turn, its newline, and the `<extra_id_1>` that ends
it (the stop token; also after the last turn). The system turn is always there, empty if need be. No BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_align.data.chat import Message
from nemo_align.data.tokenizer import Tokenizer

SYSTEM_START = "<extra_id_0>"
TURN_START = "<extra_id_1>"  # opens a user or assistant turn, and so ends the turn before it
REWARD_TOKEN = "<extra_id_2>"  # the reward is read here
ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}

# For `tokenizer.chat_template` of an export. Renders the text whose piecewise tokens are those of this module.
CHAT_TEMPLATE_JINJA = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = '' -%}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{{- '<extra_id_0>System\n' + system + '\n' -}}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<extra_id_1>User\n' + message['content'] + '\n' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<extra_id_1>Assistant\n' + message['content'] + '\n' -}}"
    "{%- else -%}"
    "{{- raise_exception('the Nemotron template has system (first), user and assistant turns only') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<extra_id_1>Assistant\n' -}}"
    "{%- elif turns and turns[-1]['role'] == 'assistant' -%}{{- '<extra_id_1>' -}}"
    "{%- endif -%}"
)

# The same for a reward model: the reward token stands after the last turn.
REWARD_CHAT_TEMPLATE_JINJA = CHAT_TEMPLATE_JINJA.replace("{{- '<extra_id_1>' -}}", "{{- '<extra_id_2>' -}}")


@dataclass(frozen=True)
class Turn:
    """Token ids of one turn: `header` up to and with its newline, `body` the text and its newline."""

    role: str
    header: tuple[int, ...]
    body: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.header) + len(self.body)


class ChatTemplate:
    """The template for one tokenizer; `default_system` is the system text of rows that have no system turn."""

    def __init__(self, tokenizer: Tokenizer, default_system: str = "") -> None:
        self.tokenizer = tokenizer
        self.default_system = default_system
        self.turn_start = tokenizer.control_id(TURN_START)
        self.reward_token = tokenizer.control_id(REWARD_TOKEN)
        self._newline = tuple(tokenizer.encode_continuation("\n"))
        if tokenizer.decode([self.turn_start, *self._newline]) != "\n":
            raise ValueError(
                f"tokenizer {tokenizer.source}: it loses newlines, which the Nemotron chat template needs; train the "
                "SentencePiece model with normalization_rule_name=identity and remove_extra_whitespaces=false"
            )
        starts = {"system": tokenizer.control_id(SYSTEM_START), "user": self.turn_start, "assistant": self.turn_start}
        self._headers = {
            role: (starts[role], *tokenizer.encode_continuation(name), *self._newline)
            for role, name in ROLE_NAMES.items()
        }

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """All turns, the system turn first (added if the messages have none)."""
        if not messages or messages[0].role != "system":
            messages = [Message("system", self.default_system), *messages]
        return [Turn(message.role, self._headers[message.role], self.response(message.content)) for message in messages]

    def response(self, text: str) -> tuple[int, ...]:
        """A turn's text and the newline that closes it."""
        return (*self.tokenizer.encode_continuation(text), *self._newline)

    def dialogue(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """(tokens, loss mask) of a dialogue for sft.

        Turns after the last response are left out: nothing is learnt from them and attention looks back only.
        """
        last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        tokens: list[int] = []
        mask: list[bool] = []
        after_response = False
        for turn in turns[: last + 1]:
            tokens += turn.header
            mask += [after_response] + [False] * (len(turn.header) - 1)
            after_response = turn.role == "assistant"
            tokens += turn.body
            mask += [after_response] * len(turn.body)
        if last >= 0:
            tokens.append(self.turn_start)
            mask.append(True)
        return tokens, mask

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens up to where the assistant begins to write."""
        return [token for turn in turns for token in (*turn.header, *turn.body)] + list(self._headers["assistant"])

    def prompt_and_response(self, prompt: Sequence[int], response: Sequence[int]) -> tuple[list[int], list[bool]]:
        """(tokens, loss mask): the response and its stop token are predicted."""
        tokens = [*prompt, *response, self.turn_start]
        return tokens, [False] * len(prompt) + [True] * (len(response) + 1)

    def rated(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """(tokens, all-false mask) of a dialogue whose last response is rated: the reward token stands last."""
        tokens = [token for turn in turns for token in (*turn.header, *turn.body)] + [self.reward_token]
        return tokens, [False] * len(tokens)


def render_dialogue(
    messages: Sequence[Message], tokenizer: Tokenizer, default_system: str = ""
) -> tuple[list[int], list[bool]]:
    """(tokens, loss mask) of one dialogue; for many, keep a ChatTemplate."""
    template = ChatTemplate(tokenizer, default_system)
    return template.dialogue(template.turns(messages))


def render_generation_prompt(messages: Sequence[Message], tokenizer: Tokenizer, default_system: str = "") -> list[int]:
    """Tokens that a model continues with the assistant's answer."""
    template = ChatTemplate(tokenizer, default_system)
    return template.prompt(template.turns(messages))


def render_prompt_response(
    messages: Sequence[Message], response: str, tokenizer: Tokenizer, default_system: str = ""
) -> tuple[list[int], list[bool]]:
    """(tokens, loss mask) of a prompt and one response, for preference training."""
    template = ChatTemplate(tokenizer, default_system)
    return template.prompt_and_response(template.prompt(template.turns(messages)), template.response(response))


def render_rated(messages: Sequence[Message], tokenizer: Tokenizer, default_system: str = "") -> list[int]:
    """Tokens of a dialogue that a reward model reads; the last is the reward token."""
    template = ChatTemplate(tokenizer, default_system)
    return template.rated(template.turns(messages))[0]


def render_text(messages: Sequence[Message], default_system: str = "") -> str:
    """The dialogue as the text that the Jinja template renders (for people and for exports)."""
    if not messages or messages[0].role != "system":
        messages = [Message("system", default_system), *messages]
    starts = {"system": SYSTEM_START, "user": TURN_START, "assistant": TURN_START}
    text = "".join(f"{starts[turn.role]}{ROLE_NAMES[turn.role]}\n{turn.content}\n" for turn in messages)
    return text + (TURN_START if messages[-1].role == "assistant" else "")
