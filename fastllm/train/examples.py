"""Small data and a small model out of Python's own standard library, for the example configurations and for tests.

Names that begin with ``example:`` stand for them in a configuration, and are made when they are first needed:

- ``example:llama``: a Llama of 0.8 million parameters, untrained, whose tokens are bytes.
- ``example:tiny-llama``: one of 24 thousand, for 256 tokens.
- ``example:sources``, ``example:held-out``: modules of the standard library, as texts.
- ``example:questions``, ``example:held-out-questions``: "What does json.dumps do?" with the docstring's first line, as conversations.
- ``example:preferences``, ``example:held-out-preferences``: "How much is 7 plus 5?", where "It is 12." is chosen and "It is twelve."
  rejected. Right answers are a matter of looking: the chosen one has digits.
- ``example:answers``: the same questions, each with one answer, in digits or in words by turns.
- ``example:sums``, ``example:held-out-sums``: the questions alone, as prompts.
- ``example:prompts``: "Say 17" and the like, to be answered by the model itself.
"""

from __future__ import annotations

import ast
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastllm.errors import ConfigError

PREFIX = "example:"
_VERSION = 1
_SPECIAL = ("<bos>", "<eos>", "<pad>")


def resolve(name: str, cache: str | os.PathLike[str] | None = None) -> str:
    """The path behind a name, made where it is not there yet; other names as they are.

    Raises:
        ConfigError: an example that does not exist.
    """
    if not name.startswith(PREFIX):
        return name
    what = name.removeprefix(PREFIX)
    if what not in _MAKERS:
        raise ConfigError(f"there is no {name!r}; there are {', '.join(PREFIX + one for one in _MAKERS)}")
    import sys

    folder = Path(cache or os.environ.get("FASTLLM_CACHE") or "~/.cache/fastllm").expanduser()
    version = f"{_VERSION}-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    path = folder / f"examples-{version}" / (what if what in _FOLDERS else f"{what}.jsonl")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        _MAKERS[what](part)
        try:
            part.rename(path)
        except OSError:  # another process was faster
            if not path.exists():
                raise
    return str(path)


def resolve_in(options: Any) -> None:
    """Puts paths in the place of such names in an Options."""
    cache = options.data.cache_dir
    for part, keys in ((options.model, ("model", "tokenizer")), (options.data, ("data", "eval_data", "pretrain_data"))):
        for key in keys:
            value = getattr(part, key)
            if isinstance(value, str):
                setattr(part, key, resolve(value, cache))
            elif isinstance(value, list):
                setattr(part, key, [resolve(one, cache) for one in value])


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes, <bos>, <eos> and <pad>, with the chat template "plain"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fastllm.train.encode import TEMPLATES

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    bos, eos, pad = _SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = TEMPLATES["plain"]
    return fast


def tiny_config(**more: Any) -> Any:
    """The configuration of the example's Llama: 0.76 M parameters, 1024 tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(**{
        "vocab_size": 259, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True, "bos_token_id": 256,
        "eos_token_id": 257, "pad_token_id": 258, **more,
    })  # fmt: skip


_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}


def _llama(folder: Path, **more: Any) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from fastllm.train.models import saved_here

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(**more))
    with saved_here(model):  # whichever process comes first
        model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _modules() -> list[Path]:
    """The standard library's modules, those for its own tests left out, always in the same order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_")) + sorted(
        path
        for name in ("json", "email", "http", "logging", "asyncio", "collections")
        for path in (folder / name).glob("*.py")
    )


def _held_out(path: Path) -> bool:
    return sum(path.name.encode()) % 16 == 0


def _sources(held_out: bool) -> Iterator[dict[str, Any]]:
    for path in _modules():
        text = path.read_text(encoding="utf-8", errors="replace")
        if _held_out(path) == held_out and text.strip():
            yield {"text": text}


def _questions(held_out: bool) -> Iterator[dict[str, Any]]:
    for path in _modules():
        if _held_out(path) != held_out:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            said = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
            if said:
                asked = f"What does {path.stem}.{node.name} do?"
                yield {
                    "messages": [
                        {"role": "user", "content": asked},
                        {"role": "assistant", "content": " ".join(said.split())},
                    ]
                }


def _preferences(held_out: bool) -> Iterator[dict[str, Any]]:
    for one in range(40):
        for other in range(40):
            if ((one + 3 * other) % 16 == 0) == held_out:
                total = one + other
                yield {
                    "prompt": f"How much is {one} plus {other}?",
                    "chosen": f"It is {total}.",
                    "rejected": f"It is {_spelt(total)}.",
                }


def _answers() -> Iterator[dict[str, Any]]:
    for n, pair in enumerate(_preferences(False)):
        yield {"prompt": pair["prompt"], "response": pair["rejected" if n % 2 else "chosen"]}


def _sums(held_out: bool) -> Iterator[dict[str, Any]]:
    for pair in _preferences(held_out):
        yield {"prompt": pair["prompt"]}


def _spelt(number: int) -> str:
    """A number below 100 in words."""
    if number < len(_SMALL):
        return _SMALL[number]
    return _TENS[number // 10 - 2] + (f"-{_SMALL[number % 10]}" if number % 10 else "")


_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _prompts() -> Iterator[dict[str, Any]]:
    for n in range(100):
        yield {"prompt": f"Say {n}"}


def share_of_digits(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """A reward that anyone can check: of each response, the share of characters that are digits."""
    return [sum(c in "0123456789" for c in response) / max(1, len(response)) for response in responses]


def _lines(rows: Callable[[], Iterator[dict[str, Any]]]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for row in rows():
                file.write(json.dumps(row) + "\n")

    return make


_FOLDERS = {"llama", "tiny-llama"}
_MAKERS: dict[str, Callable[[Path], None]] = {
    "llama": _llama,
    "tiny-llama": lambda folder: _llama(folder, **_TINY),
    "sources": _lines(lambda: _sources(False)),
    "held-out": _lines(lambda: _sources(True)),
    "questions": _lines(lambda: _questions(False)),
    "held-out-questions": _lines(lambda: _questions(True)),
    "preferences": _lines(lambda: _preferences(False)),
    "held-out-preferences": _lines(lambda: _preferences(True)),
    "answers": _lines(_answers),
    "sums": _lines(lambda: _sums(False)),
    "held-out-sums": _lines(lambda: _sums(True)),
    "prompts": _lines(_prompts),
}
