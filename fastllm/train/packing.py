"""Rows of many lengths into rows of nearly one length, and batches of either kind.

The collators are plain callables for any DataLoader or transformers.Trainer (with ``remove_unused_columns=False``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fastllm.errors import ConfigError

IGNORED = -100  # the label of a token that is not trained on


def first_fit_decreasing(lengths: Any, capacity: int, *, seed: int = 0) -> list[numpy.ndarray]:
    """Which rows share a bin: each row, the longest first, goes to the first bin with room for it.

    Never more than 11/9 of the fewest possible bins, and one more (Dósa 2007); exact, in time O(distinct lengths x bins).

    Args:
        lengths: (rows,) whole numbers, 0 < length <= capacity.
        capacity: of a bin.
        seed: of the order among rows of one length, which decides who shares a bin with whom.

    Returns:
        For every bin the indices of its rows, in the order in which they came in.
    """
    sizes = numpy.asarray(lengths, dtype=numpy.int64)
    if sizes.size and not 0 < sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"lengths must lie in 1..{capacity}, got {sizes.min()}..{sizes.max()}")
    order = numpy.random.default_rng(seed).permutation(sizes.size)
    order = order[numpy.argsort(-sizes[order], kind="stable")]
    owner = numpy.empty(sizes.size, dtype=numpy.int64)  # bin of each row, in `order`
    room = numpy.empty(0, dtype=numpy.int64)
    distinct, counts = numpy.unique(sizes, return_counts=True)
    placed = 0
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist()):
        # Rows of one length fill the first bin that has room until it has none, then the next: one sweep places them all.
        fits = room // length
        reached = numpy.cumsum(fits)
        taken = numpy.minimum(fits, numpy.maximum(0, count - (reached - fits)))
        rest = count - int(taken.sum())
        fresh = -(-rest // (capacity // length))
        taken = numpy.concatenate((taken, numpy.full(fresh, capacity // length)))
        if fresh:
            taken[-1] -= fresh * (capacity // length) - rest
        room = numpy.concatenate((room, numpy.full(fresh, capacity))) - taken * length
        owner[placed : placed + count] = numpy.repeat(numpy.arange(taken.size), taken)
        placed += count
    if not sizes.size:
        return []
    by_bin = numpy.argsort(owner, kind="stable")
    return numpy.split(order[by_bin], numpy.flatnonzero(numpy.diff(owner[by_bin])) + 1)


class PackedDataset(torch.utils.data.Dataset):
    """Bins of whole rows out of a dataset with a column `length`: item n is the list of the rows in bin n.

    Give it to a Trainer with a `PackingCollator`.
    """

    def __init__(self, rows: Any, capacity: int, *, seed: int = 0) -> None:
        self.rows, self.capacity = rows, capacity
        self.bins = first_fit_decreasing(column_of(rows, "length"), capacity, seed=seed)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[int(row)] for row in self.bins[index]]


class Evened(torch.utils.data.Dataset):
    """A dataset made longer, to a multiple of `size`, by copies of its first item of which nothing is trained on or counted.

    Where processes are to have equally many batches, accelerate completes the last ones with items that were there before, and
    means over the whole would count those twice.
    """

    def __init__(self, items: Any, size: int) -> None:
        self.items, self.size = items, size

    def __len__(self) -> int:
        return -(-len(self.items) // self.size) * self.size

    def __getitem__(self, index: int) -> Any:
        if index < len(self.items):
            return self.items[index]
        first = self.items[0]
        return [_blank(row) for row in first[:1]] if isinstance(first, list) else _blank(first)


def _blank(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [IGNORED] * len(row["input_ids"]), "blank": True}


def column_of(rows: Any, name: str) -> numpy.ndarray:
    """A column of whole numbers of a datasets.Dataset, without a Python object per row.

    Raises:
        ValueError: it has none of that name.
    """
    if hasattr(rows, "column_names") and name not in rows.column_names:
        raise ValueError(f"rows must have a column {name!r}, got {', '.join(rows.column_names)}")
    if not hasattr(rows, "data"):
        return rows[name]
    if (
        getattr(rows, "_indices", None) is not None
    ):  # after shuffle, select or train_test_split the table is still in its old order
        return numpy.asarray(rows.with_format("numpy")[name][:])
    return numpy.asarray(rows.data.column(name))


class PaddingCollator:
    """Rows side by side, padded to the longest of the batch.

    A row is a mapping with `input_ids` and, unless every token is trained on, `labels` of the same length.
    Returns input_ids, attention_mask and labels, (rows, length) int64; labels are -100 on padding, on tokens that are not
    trained on and on the first token of a row, which nothing predicts.
    """

    def __init__(self, pad_token_id: int = 0, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.multiple) * self.multiple
        ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for n, row in enumerate(rows):
            tokens = len(row["input_ids"])
            ids[n, :tokens] = torch.as_tensor(row["input_ids"])
            labels[n, :tokens] = labels_of(row)
            mask[n, :tokens] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class PackingCollator:
    """Rows one after the other in a single long row, without padding.

    Takes rows, as PaddingCollator does, or bins of them from a PackedDataset. Returns input_ids, labels and position_ids,
    (1, tokens) int64. Positions begin again with every row: by this transformers and fastllm's attention keep each row's
    attention to itself. The first label of a row is -100, so that no row predicts the next.
    """

    def __call__(self, bins: Sequence[Any]) -> dict[str, Tensor]:
        rows = [row for one in bins for row in (one if isinstance(one, list) else [one])]
        ids = torch.cat([torch.as_tensor(row["input_ids"]) for row in rows]).long()
        labels = torch.cat([labels_of(row) for row in rows])
        positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])
        return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}


def labels_of(row: dict[str, Any]) -> Tensor:
    """Labels of one row, (length,) int64, the first one -100."""
    labels = torch.as_tensor(row["labels"] if row.get("labels") is not None else row["input_ids"]).long().clone()
    labels[0] = IGNORED
    return labels


def check_rows_stay_apart(model: Any) -> None:
    """Proves on the model itself that the rows of a packed batch do not see each other, before training relies on it.

    What is computed for a row, logits or hidden states, must not depend on the row packed in front of it.

    Raises:
        ConfigError: they do, because attention, or whatever else mixes tokens, reaches across the rows.
    """
    parameter = next(model.parameters())
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, vocabulary, (9,), generator=generator) for _ in range(3))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = []
            for before in (first, other):
                batch = PackingCollator()([{"input_ids": before}, {"input_ids": second}])
                del batch["labels"]
                inputs = {k: v.to(parameter.device) for k, v in batch.items()}
                output = model(**inputs, use_cache=False, output_hidden_states=True)
                every_token = output.logits.dim() == 3  # not so of a model that scores whole rows
                found = output.logits if every_token else output.hidden_states[-1]
                logits.append(found[0, 9:].float())
    finally:
        model.train(training)
    apart = (logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp_min(1e-6)
    if not apart <= (1e-5 if parameter.dtype == torch.float32 else 5e-3):
        raise ConfigError(
            f"packing: {type(model).__name__} lets the rows of a packed batch see each other (logits differ by {apart:.1e} of the "
            "largest); use packing: false"
        )
