"""What the trainer's tests share: a tokenizer of bytes, a tiny Llama in a folder, conversations in a file."""

import json

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tokenizer():
    from fastllm.train.examples import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture
def llama(tokenizer):
    """A Llama so small that a step takes milliseconds."""
    from fastllm.train.examples import tiny_config

    transformers.set_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    return transformers.LlamaForCausalLM(tiny_config(**small))


@pytest.fixture
def folder(tmp_path, llama, tokenizer):
    """That Llama and its tokenizer as from_pretrained takes them."""
    path = tmp_path / "tiny"
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def write(tmp_path):
    """write("chats.jsonl", [row, ...]) -> its path."""

    def to_file(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return path

    return to_file


@pytest.fixture
def chats(write):
    """Sums to learn: short questions, answers of many lengths."""
    rows = [{"prompt": f"{n} times two", "response": f"It is {2 * n}" + "!" * (n % 23)} for n in range(40)]
    return write("chats.jsonl", rows)
