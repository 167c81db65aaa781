"""``fastllm stream MODEL``: a model talks in the terminal, for ever if it is let."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fastllm.errors import ConfigError
from fastllm.streaming import budget
from fastllm.streaming.cache import StreamingCache

_EVERY = 0.25  # seconds between two status lines
_CONTEXT = 8  # tokens before the new ones with which these are decoded


@dataclass
class Summary:
    """What a stream came to."""

    generated: int
    read: int
    seconds: float
    tokens_per_second: float
    memory_bytes: int
    evicted: int
    ended: str  # "count", "end of text" or "interrupted"

    def __str__(self) -> str:
        return (
            f"{self.generated:,} tokens, {self.tokens_per_second:.1f} tokens/s, cache {budget.readable(self.memory_bytes)}, "
            f"{self.evicted:,} evicted"
        )


def load(name: str, dtype: str) -> tuple[Any, Any]:
    """The model and tokenizer of a folder, or of the Hugging Face Hub."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ConfigError(f"the folder {name} has no config.json")
    if not path.exists() and name.count("/") != 1:
        raise ConfigError(f"{name!r} is neither a folder nor ORGANISATION/NAME on the Hugging Face Hub")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # of files of any kind, and of the network
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{name} does not load: {said}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


class Talk:
    """Reads tokens into a cache and draws the next ones.

    Args:
        status: where the status line goes, rewritten in place; None: nowhere.
    """

    def __init__(
        self, model: Any, tokenizer: Any, cache: StreamingCache, temperature: float, top_p: float, seed: int | None,
        status: TextIO | None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.cache, self.status = model, tokenizer, cache, status
        self.temperature, self.top_p = temperature, top_p
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(torch.seed() % 2**63 if seed is None else seed)
        self.generated = self.read = 0
        self.seconds, self.shown = 0.0, 0.0
        self.ended = "count"
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if tokenizer.eos_token_id is not None:
            self.ends.add(tokenizer.eos_token_id)

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> Tensor:
        """Logits (V,) after these tokens."""
        began = time.perf_counter()
        tokens = torch.tensor([ids], device=self.device)
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        self.seconds += time.perf_counter() - began
        return logits

    def draw(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        chances = (logits.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, which = chances.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
            chances = torch.zeros_like(chances).scatter_(0, which, ordered)
        return int(torch.multinomial(chances, 1, generator=self.generator))

    def say(self, ids: list[int], count: int | None, out: TextIO, *, through_ends: bool) -> None:
        """Reads `ids`, then writes what the model says to `out`: `count` tokens, or until the end of the text."""
        began = self.generated
        self.read += len(ids)
        logits = self.feed(ids)
        self.ended, pending, before = "count", [], ids[-_CONTEXT:]
        while count is None or self.generated - began < count:
            token = self.draw(logits)
            self.generated += 1
            if token in self.ends and not through_ends:
                self.ended = "end of text"
                self.feed([token])
                break
            pending.append(token)
            text = self.text(before, pending)
            if not text.endswith("�") or len(pending) > 8:  # a character of several tokens waits for its last one
                out.write(text)
                out.flush()
                before, pending = [*before, *pending][-_CONTEXT:], []
            logits = self.feed([token])
            self.show()
        if pending:
            out.write(self.text(before, pending))

    def text(self, before: list[int], new: list[int]) -> str:
        """What `new` adds to the text of the tokens before it: by itself it would lose the space it begins with under the
        tokenizers of Llama 2 and Mistral, which leave out that of a text."""
        old, both = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, before + new))
        return both[len(old) :] if both.startswith(old) else self.tokenizer.decode(new, skip_special_tokens=True)

    def summary(self) -> Summary:
        rate = (self.generated + self.read) / self.seconds if self.seconds else 0.0
        return Summary(
            self.generated, self.read, self.seconds, rate, self.cache.memory_bytes(), self.cache.evicted, self.ended
        )

    def show(self) -> None:
        """The status line, in the last row of the terminal, the cursor left where it is."""
        now = time.perf_counter()
        if self.status is not None and now - self.shown > _EVERY:
            self.shown = now
            self.status.write(f"\0337\033[999;1H\033[2K\033[7m {self.summary()} \033[0m\0338")
            self.status.flush()


def stream(
    name: str, *, prompt: str | None, sinks: int, window: int | None, memory: str | None, count: int | None, temperature: float,
    top_p: float, seed: int | None, dtype: str, kv_dtype: str | None, patch: bool, chat: bool, out: TextIO, say: TextIO, lines: TextIO,
) -> Summary:  # fmt: skip
    """Runs ``fastllm stream``; returns when the text ends, after `count` tokens, or at Ctrl-C."""
    for option, value, fine in (
        ("--temperature", temperature, temperature >= 0), ("--top-p", top_p, 0 < top_p <= 1),
        ("--tokens", count, count is None or count > 0), ("--window", window, window is None or window > 0),
        ("--sinks", sinks, sinks >= 0),
    ):  # fmt: skip
        if not fine:
            raise ConfigError(f"{option} cannot be {value}")
    model, tokenizer = load(name, dtype)
    if patch:
        import fastllm

        fastllm.patch(model)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{name} has no chat template: leave out --chat, and it goes on from --prompt")
    if memory is not None:
        cache = StreamingCache.fit(model, memory, sinks=sinks, kv_dtype=kv_dtype)
    else:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
        window = max(1, min(1024, limit) - sinks) if window is None else window
        cache = StreamingCache(model, sinks, window, kv_dtype=kv_dtype)
    talk = Talk(model, tokenizer, cache, temperature, top_p, seed, say if say.isatty() else None)
    try:
        if chat:
            _chat(talk, prompt, count, out, say, lines)
        else:
            ids = tokenizer(prompt or "")["input_ids"]
            if not ids:
                ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0]
            talk.say(ids, count, out, through_ends=True)
    except KeyboardInterrupt:
        talk.ended = "interrupted"
    out.write("\n")
    out.flush()
    if talk.status is not None:
        talk.status.write("\0337\033[999;1H\033[2K\0338")
    return talk.summary()


def _chat(talk: Talk, prompt: str | None, count: int | None, out: TextIO, say: TextIO, lines: TextIO) -> None:
    """A conversation: a line of the user's, an answer. Only what is new of it is read, as the cache holds the rest."""
    first = [{"role": "system", "content": prompt}] if prompt else []
    while True:
        say.write("> " if lines.isatty() else "")
        say.flush()
        line = lines.readline()
        if not line:
            return
        if not line.strip():
            continue
        talk.say(_turn(talk, first, line.strip()), count, out, through_ends=False)
        out.write("\n")
        out.flush()


_ANSWER = "<<the answer>>"


def _turn(talk: Talk, first: list[dict[str, str]], said: str) -> list[int]:
    """The tokens between the last answer and the next one. A template is for whole conversations: this is what it puts after an
    answer, less the end of the text, which the model has said itself unless it was cut short."""
    tokenizer, user = talk.tokenizer, {"role": "user", "content": said}
    if not talk.read:
        text = tokenizer.apply_chat_template([*first, user], add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    text = tokenizer.apply_chat_template([*before, user], add_generation_prompt=True, tokenize=False)
    text = text.rpartition(_ANSWER)[2]
    if talk.ended == "end of text":
        text = next((text[len(end) :] for end in map(tokenizer.decode, talk.ends) if text.startswith(end)), text)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
