"""``fastllm stream`` on a tiny model with a byte-level tokenizer."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fastllm
from fastllm import cli
from fastllm.streaming import console
from tests.patching.models import llama

TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)} | {"</s>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)
    fast.save_pretrained(path)
    llama(vocab_size=257, eos_token_id=256, max_position_embeddings=64).save_pretrained(path)
    return str(path)


def run(capsys, *arguments):
    try:
        code = cli.main(["stream", *arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_a_text_in_8_bits_takes_less_memory(capsys, folder):
    sizes = {}
    for kind in ("plain", "int8", "fp8"):
        more = () if kind == "plain" else ("--kv-dtype", kind)
        code, out, _ = run(capsys, folder, "--prompt", "Once", "--tokens", "60", "--window", "28", "--json", *more)
        found = json.loads(out)
        assert (code, found["generated"], found["evicted"]) == (0, 60, 4 + 60 - 32)
        sizes[kind] = found["memory_bytes"]
    assert sizes["int8"] == sizes["fp8"] < 0.6 * sizes["plain"]


def test_a_text_goes_on_from_a_prompt_and_says_what_it_took(capsys, folder):
    code, out, err = run(
        capsys, folder, "--prompt", "Once upon a time", "--tokens", "80", "--window", "28", "--seed", "1"
    )
    assert code == 0
    assert out.strip()
    assert "80 tokens, " in err
    assert "tokens/s, cache " in err
    assert "64 evicted" in err  # 16 + 80 - 32
    again = run(capsys, folder, "--prompt", "Once upon a time", "--tokens", "80", "--window", "28", "--seed", "1")
    assert again[1] == out


def test_json_holds_text_and_numbers(capsys, folder):
    arguments = ("--tokens", "20", "--temperature", "0", "--memory", "200KiB", "--json")
    code, out, _ = run(capsys, folder, *arguments)
    found = json.loads(out)
    assert code == 0
    assert found["generated"] == 20
    assert found["ended"] == "count"
    assert 0 < found["memory_bytes"] <= 200 * 1024
    plain = json.loads(run(capsys, folder, *arguments, "--no-patch")[1])
    assert plain["text"] == found["text"]


def test_a_chat_reads_only_what_is_new(capsys, folder, monkeypatch):
    import io

    from fastllm.streaming import console

    read = []
    feed = console.Talk.feed
    monkeypatch.setattr(console.Talk, "feed", lambda self, ids: read.append(list(ids)) or feed(self, ids))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nyes?\n"))
    code, out, _ = run(capsys, folder, "--chat", "--prompt", "kind", "--tokens", "3", "--seed", "5")
    assert code == 0
    assert out.count("\n") >= 3
    text = "".join(chr(t) if t < 256 else "" for t in read[0])
    turns = [ids for ids in read if len(ids) > 1]
    assert len(turns) == 2
    assert len(turns[0]) == len("<s>kind") + 1 + 1 + len("<u>hello") + 1 + 1 + len("<a>")  # ends are one token each
    assert len(turns[1]) == 1 + 1 + len("<u>yes?") + 1 + 1 + len("<a>")
    assert text


def test_ctrl_c_ends_it_cleanly(folder):
    # A shell's background jobs, and all they start, have the signal ignored.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from fastllm import cli; sys.exit(cli.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "stream", folder, "--prompt", "a"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout.read(40)  # it talks
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"tokens/s" in err
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no/such/folder",), "neither a folder nor"),
        (("--temperature", "-1"), "--temperature cannot be -1"),
        (("--tokens", "0"), "--tokens cannot be 0"),
        (("--memory", "1KiB"), "do not hold"),
        (("--window", "0"), "--window cannot be 0"),
    ],
)
def test_errors_are_one_line(capsys, folder, arguments, said):
    model = () if arguments[0].startswith("no") else (folder,)
    code, _, err = run(capsys, *model, *arguments)
    assert code == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_words_keep_the_spaces_between_them():
    words = ["<unk>", "▁once", "▁upon", "▁a", "▁time"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model = llama(vocab_size=5).eval()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    talk = console.Talk(model, fast, fastllm.StreamingCache(model, 2, 6), 0.0, 1.0, None, None)
    ids, drawn, out = [1], iter([2, 3, 4, 1, 2]), io.StringIO()  # as Llama 2's: a text loses the space it begins with
    talk.draw = lambda logits: next(drawn)
    talk.say(ids, 5, out, through_ends=True)
    assert out.getvalue() == " upon a time once upon"
