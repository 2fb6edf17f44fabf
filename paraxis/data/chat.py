"""Conversations as text to train on: a small declared set of templates, and which characters of them are to be predicted.

Templates are data. A tokenizer's own `chat_template` is a program, and one that says nothing of who is to be trained on what.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MESSAGES = "messages"  # the field of a record that holds its conversation: [{"role": ..., "content": ...}, ...]
ROLES = ("system", "user", "assistant")

Spans = tuple[tuple[int, int], ...]  # characters from, to


@dataclass(frozen=True)
class Template:
    """How a conversation is written: `begin`, and for each message `role` (with its {role}), the content, `end` and `after`.

    Each of `markers` is a token of its own. What the assistant says is to be predicted, and the `end` by which it stops.
    """

    begin: str
    role: str
    end: str
    after: str
    strip: bool
    markers: tuple[str, ...]

    def written(self, messages: Any) -> tuple[str, Spans]:
        """The conversation as text, and what of it is to be predicted. Raises ValueError for what is no conversation."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise ValueError("not a list of messages")
        text, spans = self.begin, []
        for number, message in enumerate(messages, start=1):
            role, content = self._checked(message, number)
            text += self.role.format(role=role)
            start = len(text)
            text += content + self.end
            if role == "assistant":
                spans.append((start, len(text)))
            text += self.after
        if not spans:
            raise ValueError("no message of the assistant, so there is nothing to predict")
        return text, tuple(spans)

    def _checked(self, message: Any, number: int) -> tuple[str, str]:
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is no object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}, which is none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has a content of type {type(content).__name__}, not text")
        # Text that spells a marker would become one, and speak in another's name.
        if spelled := next((marker for marker in self.markers if marker in content), None):
            raise ValueError(f"message {number} spells {spelled}, which marks where messages begin and end")
        return role, content.strip() if self.strip else content


TEMPLATES = {
    "chatml": Template("", "<|im_start|>{role}\n", "<|im_end|>", "\n", False, ("<|im_start|>", "<|im_end|>")),
    "llama3": Template(
        "<|begin_of_text|>",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        True,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
}
