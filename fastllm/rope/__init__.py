"""Rotary position embedding beyond the trained length: the frequencies of each scaling method, the laws that bound them, and the
switch that puts them into a model."""

from fastllm.rope import laws
from fastllm.rope.extend import Extension, extend_context, restore_context
from fastllm.rope.registration import register
from fastllm.rope.scaling import METHODS, RopeScaling, alibi_slopes, scaling

register()

__all__ = [
    "METHODS",
    "Extension",
    "RopeScaling",
    "alibi_slopes",
    "extend_context",
    "laws",
    "restore_context",
    "scaling",
]
