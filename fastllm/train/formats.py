"""What a row means: a text, a conversation, a preference or a prompt, told by its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # {"role": ..., "content": ...}, as chat templates take them
ROLES = ("system", "user", "assistant", "tool")
KNOWN = (
    "{text}, {messages}, {id, data}, {prompt, response, history}, {instruction, input, output}, {prompt, chosen, rejected} "
    "or {prompt}"
)


class RowError(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Text:
    """Text to be continued: every token is trained on."""

    text: str
    kind = "text"

    @property
    def characters(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Chat:
    """A conversation: the assistant's turns are trained on."""

    messages: list[Message]
    kind = "conversation"

    @property
    def characters(self) -> int:
        return sum(len(m["content"]) for m in self.messages)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one first."""

    prompt: list[Message]
    chosen: str
    rejected: str
    kind = "preference"

    @property
    def characters(self) -> int:
        return 2 * sum(len(m["content"]) for m in self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered by the model itself."""

    prompt: list[Message]
    kind = "prompt"


def recognise(row: dict[str, Any]) -> Text | Chat | Preference | Prompt:
    """The meaning of a row.

    Raises:
        RowError: keys of no known format, or values that do not fit them.
    """
    if "messages" in row:
        return Chat(_answered(_messages("messages", row["messages"])))
    if "chosen" in row or "rejected" in row:
        return _preference(row)
    if "data" in row:
        turns = row["data"]
        if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
            raise RowError(f"data must alternate questions and answers, an even number of texts, got {_size(turns)}")
        return Chat(_alternating([_text(f"data[{n}]", turn) for n, turn in enumerate(turns)]))
    if "instruction" in row:
        asked = _text("instruction", row["instruction"])
        if row.get("input"):
            asked += "\n\n" + _text("input", row["input"])
        return Chat(_alternating([asked, _needed(row, "output")]))
    if "prompt" in row and "response" in row:
        return Chat(
            _alternating([*_history(row.get("history")), _text("prompt", row["prompt"]), _needed(row, "response")])
        )
    if "prompt" in row:
        return Prompt(_as_messages("prompt", row["prompt"]))
    if "text" in row:
        return Text(_text("text", row["text"]))
    raise RowError(f"keys {', '.join(map(str, row)) or '(none)'} are of no known format: {KNOWN}{hint(row)}")


def hint(row: dict[str, Any]) -> str:
    """The end of a message: how a row of another trainer's format would be written here."""
    if "conversations" in row:
        return "; conversations of {from, value} would be messages of {role, content}"
    asked = next((key for key in ("prompt", "question", "query", "input") if key in row), None)
    answer = next((key for key in ("completion", "answer", "output", "target") if key in row), None)
    if asked and answer:
        return f"; {{{asked}, {answer}}} would be {{prompt, response}}"
    return ""


def _preference(row: dict[str, Any]) -> Preference:
    for key in ("prompt", "chosen", "rejected"):
        if key not in row:
            raise RowError(f"there is no {key}: a preference has prompt, chosen and rejected")
    prompt = _as_messages("prompt", row["prompt"])
    if prompt[-1]["role"] == "assistant":
        raise RowError("prompt ends with the assistant's turn, which chosen and rejected are")
    chosen, rejected = (_answer(key, row[key]) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    return Preference(prompt, chosen, rejected)


def _history(history: Any) -> list[str]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise RowError(f"history must be a list of [question, answer], got {type(history).__name__}")
    turns = []
    for n, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"history[{n}] must be [question, answer], got {_size(pair)}")
        turns += [_text(f"history[{n}][0]", pair[0]), _text(f"history[{n}][1]", pair[1])]
    return turns


def _alternating(turns: list[str]) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


def _as_messages(key: str, value: Any) -> list[Message]:
    """A prompt is a text, or messages that end before the assistant's turn."""
    if isinstance(value, list):
        return _messages(key, value)
    return [{"role": "user", "content": _text(key, value)}]


def _answer(key: str, value: Any) -> str:
    """An answer is a text, or the assistant's message alone."""
    if isinstance(value, list):
        messages = _messages(key, value)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise RowError(f"{key} must be a text or one message of the assistant, got {len(messages)} messages")
        value = messages[0]["content"]
    return _text(key, value)


def _messages(key: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{key} must be a list of messages, got {_size(value)}")
    for n, message in enumerate(value):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowError(f"{key}[{n}] must have role and content, got {_keys(message)}")
        if message["role"] not in ROLES:
            raise RowError(f"{key}[{n}].role must be one of {', '.join(ROLES)}, got {message['role']!r}")
        if not isinstance(message["content"], str):
            raise RowError(f"{key}[{n}].content must be a text, got {type(message['content']).__name__}")
    return value


def _answered(messages: list[Message]) -> list[Message]:
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("messages holds no turn of the assistant, so there is nothing to train on")
    for n in answers:
        if not messages[n]["content"].strip():
            raise RowError(f"messages[{n}], the assistant's, is empty")
    return messages


def _needed(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise RowError(f"there is no {key}")
    return _text(key, row[key])


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"{key} must be a text, got {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{key} is empty")
    return value


def _size(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, (list, tuple)) else type(value).__name__


def _keys(value: Any) -> str:
    return ", ".join(map(str, value)) or "nothing" if isinstance(value, dict) else type(value).__name__
