"""docs/extend_and_tune.py, as a user would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_model_is_extended_tuned_and_loads_again(tmp_path):
    letters = {chr(n): n for n in range(128)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters | {"?": 128}, unk_token="?"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=129, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(Path(__file__).read_text() * 3)
    script = [sys.executable, str(ROOT / "docs" / "extend_and_tune.py"), "model", "text", "out", "3"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32 -> 256 tokens" in done.stdout
    assert "step 3: loss" in done.stdout
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tuned.config.max_position_embeddings == 256
    (tmp_path / "text").write_text("short")
    assert "256 are needed" in subprocess.run(script, cwd=tmp_path, capture_output=True, text=True).stderr
