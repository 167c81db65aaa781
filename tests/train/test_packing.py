"""Packing: which rows share a bin, and that a row in a bin is trained as if it were alone."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastllm
from fastllm import ConfigError
from fastllm.train.packing import (
    IGNORED,
    PackedDataset,
    PackingCollator,
    PaddingCollator,
    check_rows_stay_apart,
    first_fit_decreasing,
)

transformers = pytest.importorskip("transformers")


def plain_first_fit_decreasing(lengths, capacity):
    """The rule itself, a row at a time; the lengths in every bin."""
    bins = []
    for length in sorted(lengths, reverse=True):
        home = next((b for b in bins if sum(b) + length <= capacity), None)
        if home is None:
            bins.append([length])
        else:
            home.append(length)
    return [sorted(b) for b in bins]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50), st.integers(0, 3))
def test_bins_are_those_of_the_plain_rule(lengths, capacity, seed):
    found = first_fit_decreasing(lengths, capacity, seed=seed)
    assert [sorted(lengths[i] for i in one) for one in found] == plain_first_fit_decreasing(lengths, capacity)
    assert sorted(i for one in found for i in one) == list(range(len(lengths)))


def test_the_seed_decides_among_rows_of_one_length():
    lengths = [3] * 30 + [5] * 30
    first, again, other = (first_fit_decreasing(lengths, 11, seed=s) for s in (0, 0, 1))
    assert all(numpy.array_equal(a, b) for a, b in zip(first, again))
    assert any(not numpy.array_equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11], [-1]])
def test_a_row_that_fits_no_bin_is_an_error(lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in 1..10, got"):
        first_fit_decreasing(lengths, 10)


def rows_of(lengths, vocabulary=259, masked=True):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.4, IGNORED) if masked else ids
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "length": length})
    return rows


def test_collators_make_what_they_say():
    rows = rows_of([3, 5], masked=False)
    padded = PaddingCollator(258, pad_to_multiple_of=4)(rows)
    assert padded["input_ids"].shape == (2, 8)
    assert padded["attention_mask"].sum(1).tolist() == [3, 5]
    assert padded["input_ids"][0, 3:].tolist() == [258] * 5
    assert padded["labels"][:, 0].tolist() == [IGNORED] * 2
    assert padded["labels"][0, 1:3].tolist() == rows[0]["input_ids"][1:]
    packed = PackingCollator()([rows])
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert packed["labels"][0, [0, 3]].tolist() == [IGNORED] * 2
    assert "attention_mask" not in packed
    without = [{"input_ids": row["input_ids"]} for row in rows]
    assert torch.equal(PackingCollator()(without)["labels"], packed["labels"])


FAMILIES = ["llama", "gemma2", "qwen3", "mistral", "gpt_neox"]


def model_of(family):
    settings = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "pad_token_id": 258,
    }  # fmt: skip
    if family == "mistral":
        settings["sliding_window"] = 6
    transformers.set_seed(0)
    config = transformers.CONFIG_MAPPING[family](**settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_are_those_of_padded_rows(family, patched):
    model = model_of(family)
    if patched:
        fastllm.patch(model)
    rows = rows_of([9, 17, 4, 12, 2])
    results = []
    for batch in (PaddingCollator(258)(rows), PackingCollator()([rows[:2], rows[2:]])):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (padded, grads), (packed, others) = results
    assert abs(padded - packed) < 1e-5
    scale = max(g.abs().max() for g in grads)
    assert max((a - b).abs().max() for a, b in zip(grads, others)) < 1e-5 * max(1.0, scale)
    check_rows_stay_apart(model)
    assert model.training


def test_a_model_that_mixes_rows_is_refused():
    config = transformers.CONFIG_MAPPING["gpt2"](n_embd=32, n_layer=1, n_head=2, vocab_size=259, n_positions=128)
    model = transformers.AutoModelForCausalLM.from_config(config)
    block = model.transformer.h[0]
    mixed = torch.nn.Module.__call__

    def average(*args, **kwargs):
        hidden = mixed(block, *args, **kwargs)
        return hidden + hidden.cumsum(1)

    model.transformer.h[0] = torch.nn.Identity()
    model.transformer.h[0].forward = average
    with pytest.raises(ConfigError, match="packing: GPT2LMHeadModel lets the rows of a packed batch see each other"):
        check_rows_stay_apart(model)


def test_a_trainer_of_ones_own_takes_the_packed_data_set(tmp_path, llama):
    import datasets

    rows = datasets.Dataset.from_list(rows_of([9, 17, 4, 12, 2, 30, 21, 8]))
    packed = PackedDataset(rows, 40)
    assert sum(len(one) for one in packed.bins) == 8
    assert all(sum(row["length"] for row in packed[n]) <= 40 for n in range(len(packed)))
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, remove_unused_columns=False, report_to="none",
        logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=llama, args=arguments, train_dataset=packed, data_collator=PackingCollator())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_rows_that_were_shuffled_or_selected_are_packed_by_their_own_lengths():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"input_ids": [1] * n, "length": n} for n in (1, 9, 2, 8, 3, 7)])
    for some in (rows.shuffle(seed=1), rows.select([1, 3, 5]), rows.filter(lambda row: row["length"] > 2)):
        packed = PackedDataset(some, 10)
        found = [[len(row["input_ids"]) for row in packed[n]] for n in range(len(packed))]
        assert sorted(length for one in found for length in one) == sorted(some["length"])
        assert max(map(sum, found)) <= 10
    with pytest.raises(ValueError, match="rows must have a column 'length', got input_ids"):
        PackedDataset(rows.remove_columns("length"), 10)
