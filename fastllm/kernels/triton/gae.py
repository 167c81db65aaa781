"""Advantages by an associative scan: one program a sequence, a block of its tokens at a time from the last to the first.

With S = V + lam A of the next valid token, a token's advantage is (r - V) + gamma (1 - done) S, and its own S is
offset + slope S' with offset = V + lam (r - V) and slope = lam gamma (1 - done), or 0 and 1 for a masked token. Such steps
compose, in any grouping.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, triton_type, warps_for

MAX_BLOCK = 2048
LEAST = tl.constexpr(2.0**-126)  # the smallest normal number


@triton.jit
def _after(slope_later, offset_later, slope, offset):
    """The step that does the later token's first. A slope of 0 takes nothing from what follows, not even a NaN; a product of
    slopes that fp32 cannot tell from 0 does."""
    cut = (slope == 0.0) | (slope_later == 0.0)
    both = tl.where(cut, 0.0, tl.maximum(slope * slope_later, LEAST))
    return both, offset + tl.where(slope == 0.0, 0.0, slope * offset_later)


@triton.jit
def _token(
    rewards_ptr, values_ptr, mask_ptr, dones_ptr, at, inside, gamma, lam, HAS_MASK: tl.constexpr, HAS_DONES: tl.constexpr
):  # fmt: skip
    """(r - V, V, gamma (1 - done), slope, offset, valid) of tokens; one outside its sequence counts as masked."""
    valid = inside
    if HAS_MASK:
        valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    value = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
    difference = tl.load(rewards_ptr + at, mask=inside, other=0.0).to(tl.float32) - value
    discount = tl.full(value.shape, 1.0, tl.float32) * gamma
    if HAS_DONES:
        discount = tl.where(tl.load(dones_ptr + at, mask=inside, other=0) != 0, 0.0, discount)
    slope = tl.where(valid, lam * discount, 1.0)
    offset = value + tl.where(lam == 0.0, 0.0, lam * difference)
    return difference, value, discount, slope, tl.where(valid, offset, 0.0), valid


@triton.jit
def _kernel(
    rewards_ptr, values_ptr, mask_ptr, dones_ptr, bounds_ptr, advantages_ptr, returns_ptr, length, gamma, lam,
    HAS_MASK: tl.constexpr, HAS_DONES: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin = tl.load(bounds_ptr + row).to(tl.int64)
        end = tl.load(bounds_ptr + row + 1).to(tl.int64)
        length = end - begin
    else:
        begin = row * length
        end = begin + length
    lanes = tl.arange(0, BLOCK)
    state = 0.0  # S of the token that follows this block
    for done in range(0, length, BLOCK):
        at = end - done - BLOCK + lanes
        # Every lane's step is its successor's, read a second time (from the cache): the scan's result is then the S that the
        # lane needs, without its own.
        _, _, _, slope, offset, _ = _token(
            rewards_ptr, values_ptr, mask_ptr, dones_ptr, at + 1, (at + 1 >= begin) & (at + 1 < end - done), gamma,
            lam, HAS_MASK, HAS_DONES,
        )  # fmt: skip
        slope, offset = tl.associative_scan((slope, offset), 0, _after, reverse=True)
        following = offset + tl.where(slope == 0.0, 0.0, slope * state)
        inside = at >= begin
        difference, value, discount, slope, offset, valid = _token(
            rewards_ptr, values_ptr, mask_ptr, dones_ptr, at, inside, gamma, lam, HAS_MASK, HAS_DONES
        )
        advantage = difference + tl.where(discount == 0.0, 0.0, discount * following)
        tl.store(advantages_ptr + at, tl.where(valid, advantage, 0.0), mask=inside)
        tl.store(returns_ptr + at, tl.where(valid, advantage + value, 0.0), mask=inside)
        step = offset + tl.where(slope == 0.0, 0.0, slope * following)
        state = tl.sum(tl.where(lanes == 0, step, 0.0), 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, dones: Tensor | None, cu_seqlens: Tensor | None, gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rewards, values = rewards.contiguous(), values.contiguous()
    advantages, returns = (torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))
    length = rewards.shape[-1]
    rows = rewards.numel() // max(length, 1) if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rewards.numel():
        block = min(MAX_BLOCK, triton.next_power_of_2(max(length, 16)))
        _kernel[(rows,)](
            rewards, values, *(rewards if t is None else t.contiguous().view(torch.uint8) for t in (mask, dones)),
            rewards if cu_seqlens is None else cu_seqlens.contiguous(), advantages, returns, length, gamma, lam,
            HAS_MASK=mask is not None, HAS_DONES=dones is not None, PACKED=cu_seqlens is not None, BLOCK=block,
            num_warps=warps_for(block, 8),
        )  # fmt: skip
    return advantages, returns


def configurations() -> list[Configuration]:
    """Rollouts of 256 and 2048 tokens, plain, masked, and packed with episodes that end."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        t = triton_type(dtype)
        signature = {
            "rewards_ptr": t, "values_ptr": t, "mask_ptr": "*u8", "dones_ptr": "*u8", "bounds_ptr": "*i32",
            "advantages_ptr": "*fp32", "returns_ptr": "*fp32", "length": "i32:16", "gamma": "fp32", "lam": "fp32",
        }  # fmt: skip
        for block, label, mask, dones, packed in (
            (256, "", False, False, False), (2048, "", False, False, False), (2048, " masked", True, False, False),
            (2048, " packed, with dones", True, True, True),
        ):  # fmt: skip
            found.append(
                Configuration(
                    _kernel, signature,
                    {"HAS_MASK": mask, "HAS_DONES": dones, "PACKED": packed, "BLOCK": block},
                    num_warps=warps_for(block, 8), label=f"gae {t[1:]} T={block}{label}",
                    work=Work(f"4096×{block}", 4096 * block * (2 * dtype.itemsize + 8 + mask + dones)),
                )
            )  # fmt: skip
    return found
