"""Texts and conversations in one batch, in fixed shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastllm.errors import ConfigError

KINDS = ("text", "conversation")


class MixedDataset(torch.utils.data.Dataset):
    """Conversations, then texts: item n is (kind, row), or (kind, bin of rows) where they are packed.

    The epoch that its sampler is in stands here, because on several processes accelerate tells the dataset alone of it where a run is
    resumed within an epoch.
    """

    def __init__(self, conversations: Any, texts: Any) -> None:
        self.conversations, self.texts, self.epoch = conversations, texts, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.conversations) + len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        if index < len(self.conversations):
            return "conversation", self.conversations[index]
        return "text", self.texts[index - len(self.conversations)]


class MixedSampler(torch.utils.data.Sampler):
    """Indices into a MixedDataset, so that every batch has the same number of texts.

    An epoch shows each conversation once, less what does not fill a last batch; texts go on from epoch to epoch, shuffled anew
    each time they have all been shown.

    Raises:
        ConfigError: a batch too small to hold both, or too few conversations for one.
    """

    def __init__(
        self, data: MixedDataset, batch_size: int, share: float, *, batches_at_once: int = 1, seed: int = 0
    ) -> None:
        if batch_size < 2:
            raise ConfigError(
                f"stage mixed needs per_device_train_batch_size of 2 or more, a text and a conversation, got {batch_size}"
            )
        self.data, self.seed = data, seed
        self.texts = min(batch_size - 1, max(1, round(share * batch_size)))
        self.conversations = batch_size - self.texts
        self.batches = len(data.conversations) // self.conversations // batches_at_once * batches_at_once
        if not self.batches:
            raise ConfigError(
                f"{len(data.conversations)} conversations do not fill a batch with {self.conversations} of them on each of "
                f"{batches_at_once} processes"
            )

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def __len__(self) -> int:
        return self.batches * (self.texts + self.conversations)

    def __iter__(self) -> Iterator[int]:
        epoch = self.data.epoch
        generator = torch.Generator().manual_seed(self.seed + epoch)
        conversations = torch.randperm(len(self.data.conversations), generator=generator).tolist()
        shown = epoch * self.batches * self.texts
        for batch in range(self.batches):
            begin = batch * self.conversations
            yield from conversations[begin : begin + self.conversations]
            for n in range(self.texts):
                yield len(self.data.conversations) + self._text(shown + batch * self.texts + n)

    def _text(self, position: int) -> int:
        """The text at a position of the endless row of shuffles."""
        shuffle, place = divmod(position, len(self.data.texts))
        if getattr(self, "_shuffle", None) != shuffle:
            generator = torch.Generator().manual_seed(self.seed + 7919 * (shuffle + 1))
            self._order = torch.randperm(len(self.data.texts), generator=generator)
            self._shuffle = shuffle
        return int(self._order[place])


class MixedCollator:
    """A batch of a MixedDataset as {"text": batch, "conversation": batch}, each by the collator given; other rows by it alone."""

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        if not isinstance(items[0], tuple):  # validation data: conversations alone
            return self.collator(items)
        return {kind: self.collator([row for one, row in items if one == kind]) for kind in KINDS}
