"""The option that makes a model's attention LongNet's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DilatedConfig:
    """LongNet's patterns for ``patch(model, ops={"attention": DilatedConfig([...], [...])})``.

    Args:
        segment_lengths: tokens of the segments of each pattern, for example [2048, 4096, 8192].
        dilation_rates: of every how many tokens of a segment a head keeps one, for example [1, 2, 4].

    Raises:
        ValueError: unless there are as many of both, at least one, all of them whole and at least 1.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_lengths", tuple(self.segment_lengths))
        object.__setattr__(self, "dilation_rates", tuple(self.dilation_rates))
        numbers = (*self.segment_lengths, *self.dilation_rates)
        same = len(self.segment_lengths) == len(self.dilation_rates)
        if not numbers or not same or any(not isinstance(n, int) or n < 1 for n in numbers):
            raise ValueError(
                "segment_lengths and dilation_rates must pair up, at least one pair, whole numbers of at least 1, got "
                f"{list(self.segment_lengths)} and {list(self.dilation_rates)}"
            )
