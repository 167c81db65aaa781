"""Files, formats and token ids: what every kind of row becomes, and what is said of rows that become nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm import ConfigError, DataError
from fastllm.train import data, encode, files, formats, lock
from fastllm.train.packing import IGNORED
from tests.train.elsewhere import killed_inside

Q, A = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def prepared(path, tokenizer, kind="conversation", max_length=256, **options):
    own = {name: options.pop(name) for name in ("train_on_prompt",) if name in options}
    return data.prepare(str(path), encode.Encoder(tokenizer, max_length, **own), kind=kind, **options)


def trained_text(tokenizer, row):
    return tokenizer.decode([i for i in row["labels"] if i != IGNORED])


# ---- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [Q, A]}, [Q, A]),
        ({"id": 7, "data": ["Why?", "Because.", "Why?", "Because."]}, [Q, A, Q, A]),
        ({"prompt": "Why?", "response": "Because."}, [Q, A]),
        ({"prompt": "Why?", "response": "Because.", "history": [["Why?", "Because."]]}, [Q, A, Q, A]),
        ({"prompt": "Why?", "response": "Because.", "history": None}, [Q, A]),
        ({"instruction": "Why?", "input": "", "output": "Because."}, [Q, A]),
        ({"instruction": "Why?", "input": "This.", "output": "Because."}, [{**Q, "content": "Why?\n\nThis."}, A]),
    ],
)
def test_conversations_have_many_forms_and_one_meaning(row, expected):
    assert formats.recognise(row) == formats.Chat(expected)


def test_texts_preferences_and_prompts():
    assert formats.recognise({"text": "a", "url": "b"}) == formats.Text("a")
    assert formats.recognise({"prompt": "Why?"}) == formats.Prompt([Q])
    assert formats.recognise({"prompt": "Why?", "chosen": "x", "rejected": "y"}) == formats.Preference([Q], "x", "y")
    spoken = {"prompt": [Q], "chosen": [{**A, "content": "x"}], "rejected": [{**A, "content": "y"}]}
    assert formats.recognise(spoken) == formats.Preference([Q], "x", "y")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"q": 1}, "keys q are of no known format"),
        ({}, "keys \\(none\\)"),
        ({"text": 3}, "text must be a text, got int"),
        ({"text": " "}, "text is empty"),
        ({"messages": []}, "messages must be a list of messages, got 0 of them"),
        ({"messages": [Q]}, "no turn of the assistant"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role must be one of .*, got 'bot'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] must have role and content, got role"),
        ({"messages": [Q, {**A, "content": None}]}, r"messages\[1\].content must be a text"),
        ({"messages": [Q, {**A, "content": ""}]}, r"messages\[1\], the assistant's, is empty"),
        ({"data": ["a"]}, "an even number of texts, got 1"),
        ({"data": ["a", 2]}, r"data\[1\] must be a text"),
        ({"instruction": "a"}, "there is no output"),
        ({"prompt": "a", "response": "b", "history": [["c"]]}, r"history\[0\] must be \[question, answer\]"),
        ({"prompt": "a", "chosen": "b"}, "there is no rejected: a preference has prompt, chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(row, problem):
    with pytest.raises(formats.RowError, match=problem):
        formats.recognise(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, "would be messages of {role, content}"),
        ({"question": "a", "answer": "b"}, "{question, answer} would be {prompt, response}"),
        ({"prompt": "a", "completion": "b"}, "{prompt, completion} would be {prompt, response}"),
    ],
)
def test_rows_of_other_trainers_are_told_how_they_are_written(tokenizer, write, row, said):
    with pytest.raises(DataError) as raised:
        prepared(write("other.jsonl", [row]), tokenizer)
    assert said in str(raised.value)


# ---- labels ------------------------------------------------------------------------------------------------------


def test_every_turn_of_the_assistant_is_trained_on_and_nothing_else(tokenizer, write):
    path = write("c.jsonl", [{"messages": [{"role": "system", "content": "S"}, Q, A, Q, {**A, "content": "So, é!"}]}])
    row = prepared(path, tokenizer).rows[0]
    assert trained_text(tokenizer, row) == "Because.<eos>\n\nSo, é!<eos>\n\n"
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"]))
    assert row["length"] == len(row["input_ids"])
    assert tokenizer.decode(row["input_ids"]).startswith("<bos>### System:\nS\n\n### User:\nWhy?")


def test_train_on_prompt_trains_on_all(tokenizer, write):
    found = prepared(write("c.jsonl", [{"messages": [Q, A]}]), tokenizer, train_on_prompt=True)
    assert "labels" not in found.rows.column_names
    assert found.report.total.trained == found.report.total.tokens - 1


def test_a_template_that_shows_only_the_last_reasoning_is_masked_all_the_same(tokenizer, write):
    from fastllm.train.examples import byte_tokenizer

    thinking = byte_tokenizer()
    thinking.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}(thinks){% endif %}{{ m.content }};"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = prepared(write("c.jsonl", [{"messages": [Q, A, Q, A]}]), thinking).rows[0]
    assert trained_text(thinking, row) == "Because.;(thinks)Because.;"


def test_the_header_of_a_turn_is_not_trained_on_where_the_prompt_for_it_goes_further(write):
    """As DeepSeek-R1's template asks for reasoning that it does not keep in a conversation."""
    from fastllm.train.examples import byte_tokenizer

    asking = byte_tokenizer()
    asking.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content }}<E>{% else %}<U>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<A><think>{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "<th"), ("user", "b"), ("assistant", "c"), ("assistant", "d")]
    row = prepared(write("c.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}]), asking).rows[0]
    assert trained_text(asking, row) == "<th<E>c<E>d<E>"


def test_a_template_that_cannot_be_masked_is_an_error(write):
    from fastllm.train.examples import byte_tokenizer

    odd = byte_tokenizer()
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"c.jsonl:1: .*renders a conversation differently once more turns follow"):
        prepared(write("c.jsonl", [{"messages": [Q, A, Q, A]}]), odd)


def test_a_template_that_is_no_jinja_is_one_error_and_not_one_for_each_row(write):
    from fastllm.train.examples import byte_tokenizer

    torn = byte_tokenizer()
    torn.chat_template = "{% for m in messages %}\n{{ m.content "
    with pytest.raises(ConfigError, match=r"the chat template is no Jinja: .* \(line 2\)"):
        prepared(write("c.jsonl", [{"messages": [Q, A]}]), torn)


def test_no_template_is_an_error_that_names_the_remedy(write):
    from fastllm.train.examples import byte_tokenizer

    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="give chat_template, 'plain' say"):
        prepared(write("c.jsonl", [{"messages": [Q, A]}]), bare)
    encode.use_template(bare, "chatml")
    assert "<|im_start|>" in bare.chat_template
    with pytest.raises(ConfigError, match="got 'no_such'"):
        encode.use_template(bare, "no_such")


def test_a_row_that_the_template_refuses_is_a_bad_row(write, tokenizer):
    from fastllm.train.examples import byte_tokenizer

    strict = byte_tokenizer()
    strict.chat_template = (
        "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + strict.chat_template
    )
    rows = [{"messages": [{"role": "system", "content": "S"}, Q, A]}, {"messages": [Q, A]}]
    found = prepared(write("c.jsonl", rows), strict, on_bad_row="skip")
    assert "the chat template refuses it: no system here" in found.report.told()
    assert len(found.rows) == 1


# ---- lengths -----------------------------------------------------------------------------------------------------


def test_truncation_keeps_the_latest_turns_and_the_system_message(tokenizer, write):
    turns = [{"role": "system", "content": "Sys"}]
    for n in range(12):
        turns += [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]
    found = prepared(write("c.jsonl", [{"messages": turns}]), tokenizer, max_length=200)
    text = tokenizer.decode(found.rows[0]["input_ids"])
    assert found.report.total.cut == 1
    assert text.startswith("<bos>### System:\nSys\n\n### User:\nquestion ")
    assert text.endswith("answer 11<eos>\n\n")
    assert "answer 2<" not in text
    kept = text.count("answer")
    more = len(tokenizer("### User:\nquestion 5\n\n### Assistant:\nanswer 5<eos>\n\n").input_ids)
    assert found.rows[0]["length"] <= 200 < found.rows[0]["length"] + more, f"{kept} turns kept, one more would fit"
    assert trained_text(tokenizer, found.rows[0]).count("answer") == kept


def test_an_exchange_too_long_by_itself_loses_the_beginning_of_its_prompt_then_the_end_of_its_answer(tokenizer, write):
    long_prompt = {"prompt": "x" * 300 + "END", "response": "answer"}
    long_answer = {"prompt": "ask", "response": "BEGIN" + "y" * 300}
    rows = prepared(write("c.jsonl", [long_prompt, long_answer]), tokenizer, max_length=64).rows
    assert [row["length"] for row in rows] == [64, 64]
    assert trained_text(tokenizer, rows[0]) == "answer<eos>\n\n"
    assert "END\n\n### Assistant:\nanswer" in tokenizer.decode(rows[0]["input_ids"])
    assert trained_text(tokenizer, rows[1]).startswith("BEGINyyy")


def test_texts_become_pieces_that_lose_nothing(tokenizer, write):
    text = "".join(chr(97 + n % 26) for n in range(1000))
    found = prepared(write("t.jsonl", [{"text": text}, {"text": "short"}]), tokenizer, kind="text", max_length=128)
    assert tokenizer.decode([i for row in found.rows for i in row["input_ids"]]) == text + "<eos>short<eos>"
    assert max(row["length"] for row in found.rows) == 128
    assert "labels" not in found.rows.column_names


# ---- files -------------------------------------------------------------------------------------------------------


def test_folders_lists_and_every_kind_of_file(tokenizer, tmp_path, write):
    import pyarrow
    from pyarrow import parquet

    write("in/a.jsonl", [{"text": "one"}, "", {"text": "two"}])
    (tmp_path / "in" / "deep").mkdir()
    parquet.write_table(pyarrow.table({"text": ["three", "four"]}), tmp_path / "in" / "deep" / "b.parquet")
    (tmp_path / "in" / "c.txt").write_text("five\nfive\n")
    (tmp_path / "in" / "notes.md").write_text("not data")
    more = write("d.jsonl", [{"text": "six"}])
    encoder = encode.Encoder(tokenizer, 64)
    found = data.prepare([str(tmp_path / "in"), str(more)], encoder, kind="text")
    texts = {tokenizer.decode(row["input_ids"]) for row in found.rows}
    assert texts == {"one<eos>", "two<eos>", "three<eos>", "four<eos>", "five\nfive\n<eos>", "six<eos>"}
    assert {name.rsplit("/", 1)[-1]: t.rows for name, t in found.report.sources.items()} == {
        "a.jsonl": 2, "b.parquet": 2, "c.txt": 1, "d.jsonl": 1,
    }  # fmt: skip
    assert found.report.total.tokens == sum(row["length"] for row in found.rows)


def test_a_long_text_file_is_cut_at_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DOCUMENT_BYTES", 20)
    path = tmp_path / "a.txt"
    path.write_text("0123456789\n" * 5)
    rows = list(files.read(path))
    assert [row.line for row in rows] == [1, 3, 5]
    assert "".join(row.value["text"] for row in rows) == path.read_text()


BAD = [
    {"prompt": "a", "response": "b"}, "{not json", {"prompt": "a", "response": ""}, [1], {"text": "t"},
    {"prompt": "c", "response": "d"},
]  # fmt: skip


def test_bad_rows_are_counted_and_shown_with_file_and_line(tokenizer, write, capsys):
    path = write("bad.jsonl", BAD)
    with pytest.raises(DataError) as raised:
        prepared(path, tokenizer)
    message = str(raised.value)
    assert "4 of 6 rows cannot be used" in message
    assert f"{path}:2: not JSON: Expecting property name" in message
    assert f"{path}:3: response is empty" in message
    assert f"{path}:4: not a JSON object but list" in message
    assert f"{path}:5: a text, where the stage takes conversations" in message
    assert "\n" not in message
    found = prepared(path, tokenizer, on_bad_row="skip")
    assert len(found.rows) == 2
    assert found.report.total.bad == 4
    assert "4 of 6 rows cannot be used" in capsys.readouterr().err
    with pytest.raises(DataError, match="4 of 6"):  # what the cache holds was written by "skip"
        prepared(path, tokenizer)


def test_only_ten_bad_rows_are_shown(tokenizer, write):
    path = write("bad.jsonl", ["x"] * 25 + [{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError) as raised:
        prepared(path, tokenizer)
    assert f"25 of 26 rows cannot be used: {path}:1, 2, 3, 4, 5, 6, 7, 8, 9, 10: not JSON" in str(raised.value)
    assert "and 15 more (on_bad_row: skip" in str(raised.value)
    with pytest.raises(DataError) as raised:
        prepared(write("worse.jsonl", ["x"]), tokenizer)
    assert "skip" not in str(raised.value)  # there would be no others


def test_bytes_that_are_no_text_are_bad_rows(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "ok \\ud83d\\ude00"}\n{"text": "\xff"}\n{"text": "\\uD83D"}\n')
    found = prepared(path, tokenizer, kind="text", on_bad_row="skip")
    assert found.report.bad == [
        (str(path), 2, "not UTF-8 (byte 11 of the line)"),
        (str(path), 3, "half of a surrogate pair, which is no character"),
    ]
    assert len(found.rows) == 1


def test_nothing_to_read_is_an_error(tokenizer, tmp_path, write):
    for source, message in (
        (tmp_path / "no.jsonl", "there is no file or folder"),
        (write("a.csv", ["a,b"]), r"is no .jsonl, .parquet, .txt file"),
        (write("empty.jsonl", []), "data is empty"),
        (write("blank.txt", ["", " "]), "data is empty"),
    ):
        with pytest.raises(DataError, match=message):
            prepared(source, tokenizer, kind="text")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no"):
        prepared(tmp_path / "bare", tokenizer)
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="no readable Parquet file"):
        prepared(broken, tokenizer, kind="text")
    with pytest.raises(DataError, match="data is empty"):
        prepared(write("allbad.jsonl", ["x"]), tokenizer, on_bad_row="skip")


# ---- the cache ---------------------------------------------------------------------------------------------------


def test_data_are_tokenised_once_by_content_tokenizer_and_settings(tokenizer, write, monkeypatch, tmp_path):
    from fastllm.train.examples import byte_tokenizer

    path = write("c.jsonl", [{"prompt": "a", "response": "b"}])
    first = prepared(path, tokenizer)
    copied = write("elsewhere/c.jsonl", [{"prompt": "a", "response": "b"}])
    calls = []
    written = data._write
    monkeypatch.setattr(data, "_write", lambda *a: calls.append(a) or written(*a))
    again = prepared(copied, tokenizer)
    assert not calls
    assert again.fingerprint == first.fingerprint
    assert list(again.report.sources) == [str(copied)]
    other = byte_tokenizer()
    encode.use_template(other, "chatml")
    keys = {first.fingerprint}
    keys.add(prepared(path, other).fingerprint)
    keys.add(prepared(path, tokenizer, max_length=128).fingerprint)
    keys.add(prepared(path, tokenizer, train_on_prompt=True).fingerprint)
    path.write_text(json.dumps({"prompt": "a", "response": "c"}) + "\n")
    keys.add(prepared(path, tokenizer).fingerprint)
    assert len(keys) == len(calls) + 1 == 5


def test_what_a_kill_has_left_half_written_goes_at_the_next_run_and_what_is_being_written_stays(
    tokenizer, write, tmp_path
):
    path, cache = write("a.jsonl", [{"messages": [Q, A]}]), tmp_path / "cache"
    cache.mkdir()
    with killed_inside(data._written_whole(cache / "other.arrow")):
        (half,) = cache.glob("*.part")
        prepared(path, tokenizer)
        assert half.exists()
    assert half.exists(), "the test's own premise: a kill leaves it"
    prepared(path, tokenizer)
    assert not half.exists()


def test_a_file_taken_for_abandoned_before_it_was_locked_is_begun_anew(tokenizer, write, tmp_path, monkeypatch):
    def late(file, take=lock.take):
        monkeypatch.setattr(lock, "take", take)
        Path(file.name).unlink()
        return take(file)

    monkeypatch.setattr(lock, "take", late)
    assert len(prepared(write("a.jsonl", [{"messages": [Q, A]}]), tokenizer).rows) == 1


def test_a_failed_reading_leaves_nothing_behind(tokenizer, write, tmp_path):
    with pytest.raises(DataError):
        prepared(write("bad.jsonl", BAD), tokenizer)
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.startswith("digest-")]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts memory so")
def test_what_reading_holds_in_memory_does_not_grow_with_the_file(tokenizer, tmp_path):
    code = """
import re, sys
from fastllm.train import data, encode, packing
from fastllm.train.examples import byte_tokenizer

def megabytes(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1e3

for path in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM, the most ever held, begins anew
    before = megabytes("VmRSS")
    found = data.prepare(path, encode.Encoder(byte_tokenizer(), 256), kind="text", cache=sys.argv[1])
    bins = packing.PackedDataset(found.rows, 512)
    for n in range(0, len(bins), 5):
        bins[n]
    print(megabytes("VmHWM") - before)
"""
    paths = []
    for rows in (100, 3000):
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:  # most of a row is no text, so that reading is long and tokenising short
            for n in range(rows):
                file.write(json.dumps({"text": f"{n} " + "word " * 20, "page": "x" * 20000}) + "\n")
        paths.append(str(path))
    command = [sys.executable, "-c", code, str(tmp_path / "c"), *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert small < 150, f"{small} MB at most for 2 MB of rows"
    assert large < 40, f"{large} MB more at most for 60 MB of rows"
