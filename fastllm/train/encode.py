"""Texts and conversations as token ids, with a mark on every token that is trained on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm.errors import ConfigError
from fastllm.train.formats import Chat, Message, Preference, RowError, Text

# Templates for tokenizers without one.
TEMPLATES = {
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}### {{ message['role'] | capitalize }}:{{ '\n' }}"
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
        "{% endfor %}{% if add_generation_prompt %}### Assistant:{{ '\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}{{ '\n' }}{{ message['content'] }}<|im_end|>{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
}


_Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and the characters of each


@dataclass(frozen=True)
class Encoded:
    """A row of token ids. `trained` has an element per token, or is None where all are trained on. `cut`: some were left out.
    Of a preference the row is the chosen conversation, `chosen` tokens long, and after it the rejected one."""

    input_ids: list[int]
    trained: list[bool] | None = None
    cut: bool = False
    chosen: int = 0


def use_template(tokenizer: Any, template: str | None) -> None:
    """Gives the tokenizer a chat template: one of `TEMPLATES`, a Jinja file, or None for its own.

    Raises:
        ConfigError: no such template or file.
    """
    if template is None:
        return
    if template not in TEMPLATES and not Path(template).is_file():
        raise ConfigError(
            f"chat_template must be {', '.join(map(repr, TEMPLATES))} or a file with a Jinja template, got {template!r}"
        )
    if template == "plain" and tokenizer.eos_token is None:
        raise ConfigError("chat_template 'plain' ends turns with the tokenizer's eos_token, and it has none")
    tokenizer.chat_template = TEMPLATES.get(template) or Path(template).read_text(encoding="utf-8")


class Encoder:
    """Encodes examples of one kind by one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers; for conversations, with a chat template.
        max_length: tokens of a row at most. A longer text becomes several rows, a longer conversation loses its earliest turns.
        train_on_prompt: mark every token of a conversation, not the assistant's turns alone.

    Raises:
        ConfigError: a tokenizer that cannot say which characters a token stands for, or a chat template that fails.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, train_on_prompt: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__} is no fast tokenizer, which masking prompts needs")
        self.tokenizer, self.max_length, self.train_on_prompt = tokenizer, max_length, train_on_prompt

    def texts(self, texts: Sequence[Text]) -> list[list[Encoded]]:
        """The rows of each text: its tokens with an end-of-sequence token after them, in pieces of `max_length`."""
        if not texts:
            return []
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        found = self.tokenizer([t.text for t in texts], return_attention_mask=False, verbose=False)["input_ids"]
        rows = []
        for ids in found:
            ids = ids if ids[-1:] == end else ids + end
            pieces = [ids[n : n + self.max_length] for n in range(0, len(ids), self.max_length)]
            if len(pieces[-1]) == 1 and len(pieces) > 1:  # of a row's first token nothing is predicted
                pieces.pop()
            rows.append([Encoded(piece) for piece in pieces])
        return rows

    def chats(self, chats: Sequence[Chat]) -> list[Encoded | RowError]:
        """The row of each conversation, or what is wrong with it."""
        self._need_template()
        results: list[Encoded | RowError] = []
        rendered: list[_Rendered | RowError] = []
        for chat in chats:
            try:
                rendered.append(self._render(chat.messages))
            except RowError as error:
                rendered.append(error)
        ids = iter(self._tokens([r.text for r in rendered if isinstance(r, _Rendered)]))
        for chat, one in zip(chats, rendered):
            if isinstance(one, RowError):
                results.append(one)
                continue
            tokens = next(ids)
            try:
                row = self._marked(one, tokens) if len(tokens[0]) <= self.max_length else self._shortened(chat)
                results.append(row)
            except RowError as error:
                results.append(error)
        return results

    def preferences(self, preferences: Sequence[Preference]) -> list[Encoded | RowError]:
        """The row of each preference, or what is wrong with it. Only the answers, the last turns, are marked as trained on. Where
        either is too long, both lose the same of their prompt."""
        self._need_template()
        rendered: list[list[_Rendered] | RowError] = []
        for preference in preferences:
            try:
                rendered.append(
                    [self._answered(preference.prompt, a) for a in (preference.chosen, preference.rejected)]
                )
            except RowError as error:
                rendered.append(error)
        ids = iter(self._tokens([one.text for pair in rendered if isinstance(pair, list) for one in pair]))
        results: list[Encoded | RowError] = []
        for preference, pair in zip(preferences, rendered):
            if isinstance(pair, RowError):
                results.append(pair)
                continue
            try:
                results.append(self._paired(preference, [self._marked(one, next(ids)) for one in pair]))
            except RowError as error:
                results.append(error)
        return results

    def _need_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, which conversations need: give chat_template, 'plain' say, or a Jinja file"
            )

    # ---- preferences ---------------------------------------------------------------------------------------------

    def _paired(self, preference: Preference, rows: list[Encoded]) -> Encoded:
        if cut := max(len(row.input_ids) for row in rows) > self.max_length:
            answers = (preference.chosen, preference.rejected)

            def render(messages: list[Message]) -> list[_Rendered]:
                return [self._answered(messages[:-1], answer) for answer in answers]

            whole = [*preference.prompt, {"role": "assistant", "content": preference.chosen}]
            rows = [self._marked(one, ids) for one, ids in zip(*self._without_the_earliest(whole, render))]
            begin = self._spare(max(len(row.input_ids) for row in rows), min(row.trained.index(True) for row in rows))  # type: ignore[union-attr]
            kept = slice(begin, begin + self.max_length)
            rows = [Encoded(row.input_ids[kept], (row.trained or [])[kept]) for row in rows]
        chosen, rejected = rows
        if chosen.input_ids == rejected.input_ids:
            raise RowError(f"chosen and rejected are the same in the {self.max_length} tokens of max_length")
        if not (any((chosen.trained or [])[1:]) and any((rejected.trained or [])[1:])):
            raise RowError("of chosen or rejected no token is left")
        trained = [*(chosen.trained or ()), *(rejected.trained or ())]
        return Encoded(chosen.input_ids + rejected.input_ids, trained, cut, len(chosen.input_ids))

    def _answered(self, prompt: list[Message], answer: str) -> _Rendered:
        rendered = self._render([*prompt, {"role": "assistant", "content": answer}])
        return _Rendered(rendered.text, rendered.spans[-1:])

    # ---- conversations -------------------------------------------------------------------------------------------

    def _tokens(self, texts: list[str]) -> list[_Tokens]:
        if not texts:
            return []
        found = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return list(zip(found["input_ids"], found["offset_mapping"]))

    def _marked(self, rendered: _Rendered, tokens: _Tokens) -> Encoded:
        ids, offsets = tokens
        if self.train_on_prompt:
            return Encoded(ids)
        trained = [False] * len(ids)
        spans = iter(rendered.spans)
        span = next(spans, None)
        for n, (begin, end) in enumerate(offsets):
            while span and begin >= span[1]:
                span = next(spans, None)
            if span and end > span[0] and end > begin:
                trained[n] = True
        if not any(trained[1:]):
            raise RowError("no token of the assistant's is left to train on")
        return Encoded(ids, trained)

    def _shortened(self, chat: Chat) -> Encoded:
        """Without the earliest exchanges, as many as it takes; the system's message stays."""
        (rendered,), (tokens,) = self._without_the_earliest(chat.messages, lambda messages: [self._render(messages)])
        return Encoded(*self._squeezed(self._marked(rendered, tokens)), cut=True)

    def _without_the_earliest(
        self, messages: list[Message], render: Callable[[list[Message]], list[_Rendered]]
    ) -> tuple[list[_Rendered], list[_Tokens]]:
        """What `render` makes of the messages and its tokens, with the fewest exchanges left out with which all of it fits, or with
        the last one alone."""
        first = [m for m in messages[:1] if m["role"] == "system"]
        rest = messages[len(first) :]
        starts = [n for n, m in enumerate(rest) if m["role"] == "user"] or [0]
        starts = [n for n in starts if any(m["role"] == "assistant" for m in rest[n:])] or [0]
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            found = self._tokens([one.text for one in render(first + rest[starts[middle] :])])
            if all(len(ids) <= self.max_length for ids, _ in found):
                high = middle
            else:
                low = middle + 1
        rendered = render(first + rest[starts[low] :])
        return rendered, self._tokens([one.text for one in rendered])

    def _squeezed(self, row: Encoded) -> tuple[list[int], list[bool] | None]:
        """The last exchange alone is too long: the prompt loses its beginning, down to half a row, then the answer its end."""
        ids, trained = row.input_ids, row.trained
        begin = self._spare(len(ids), trained.index(True) if trained else 0)
        kept = slice(begin, begin + self.max_length)
        return ids[kept], trained[kept] if trained else None

    def _spare(self, tokens: int, prompt: int) -> int:
        return max(0, min(tokens - self.max_length, prompt - self.max_length // 2))

    def _render(self, messages: list[Message]) -> _Rendered:
        whole = self._template(messages)
        if self.train_on_prompt:
            return _Rendered(whole, [(0, len(whole))])
        spans = []
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:n], add_generation_prompt=True)
            if not whole.startswith(
                before
            ):  # the last of several turns in a row, or asked for with a <think> that is not kept
                before = self._begun(
                    whole, before, self._template(messages[:n]) if n else "", message["content"].strip()
                )
            after = self._template(messages[: n + 1])
            if not whole.startswith(before) or not after.startswith(before):
                raise RowError(_UNSTABLE)
            if whole.startswith(after):
                spans.append((len(before), len(after)))
                continue
            # Some templates render the last answer differently (with its reasoning, say): what follows the answer's text there
            # follows it here as well.
            content = message["content"].strip()
            answer = after[len(before) :]
            place = answer.rfind(content)
            tail = answer[place + len(content) :]
            end = whole.find(content + tail, len(before)) if place >= 0 else -1
            if end < 0:
                raise RowError(_UNSTABLE)
            spans.append((len(before), end + len(content + tail)))
        return _Rendered(whole, spans)

    @staticmethod
    def _begun(whole: str, asked: str, before: str, content: str) -> str:
        """`before`, and of what asks for an answer as much as `whole` has there: the turn's header, and nothing of its content."""
        shared = os.path.commonprefix((whole, asked))  # noqa: RUF071 - of texts
        place = whole.find(content, len(before))
        return max(before, shared if place < 0 else shared[:place], key=len)

    def _template(self, messages: list[Message], **more: Any) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        if not messages and not more:
            return ""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is no Jinja: {error.message} (line {error.lineno})") from None
        except TemplateError as error:  # raise_exception() in a template: this conversation is not one it takes
            raise RowError(f"the chat template refuses it: {' '.join(str(error).split())}") from None
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RowError(f"the chat template fails on it: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text, and the characters [begin, end) of each of the assistant's turns."""

    text: str
    spans: list[tuple[int, int]]


_UNSTABLE = (
    "the chat template renders a conversation differently once more turns follow, so that the assistant's part cannot be told "
    "apart: give another chat_template, or train_on_prompt: true"
)
