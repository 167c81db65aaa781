"""Keys and values in 8 bits: every token's head with one fp32 scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm.errors import ConfigError


@dataclass(frozen=True)
class EightBits:
    """A format of 8 bits whose largest number is `most`; the largest of a head's D numbers is stored as that.

    The error of a number is at most half a step: in int8 1/254 of the largest of its head, in fp8 (e4m3) 1/16 of the number itself,
    or 2^-10 / 448 of the largest where it is very small.
    """

    dtype: torch.dtype
    most: float

    def packed(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> their bits as int8, and fp32 scales (..., 1). Zeros have scale 0; NaN and Inf come out as NaN."""
        numbers = numbers.float()
        scales = numbers.abs().amax(-1, keepdim=True) / self.most
        whole = torch.where(scales > 0, numbers / scales, 0.0)
        if self.dtype == torch.int8:
            return whole.round_().clamp_(-self.most, self.most).nan_to_num_().to(torch.int8), scales
        return whole.clamp_(-self.most, self.most).to(self.dtype).view(torch.int8), scales

    def unpacked(self, bits: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return (bits.view(self.dtype).float() * scales).to(dtype)

    def rounded(self, numbers: Tensor) -> Tensor:
        return self.unpacked(*self.packed(numbers), numbers.dtype)


FORMATS = {"int8": EightBits(torch.int8, 127.0), "fp8": EightBits(torch.float8_e4m3fn, 448.0)}


def named(name: str | None) -> EightBits | None:
    """Raises a ConfigError for another name than "int8" and "fp8"."""
    if name is None:
        return None
    if name not in FORMATS:
        raise ConfigError(f'kv_dtype must be None, "int8" or "fp8", got {name!r}')
    return FORMATS[name]
