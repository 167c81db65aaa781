"""The kernels as functions, for scripts that patch nothing. All are registered with PyTorch, and all but
gae are differentiable."""

from fastllm.ops.add_rms_norm import add_rms_norm
from fastllm.ops.apply_rope import apply_rope
from fastllm.ops.attention import attention
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.decode_attention import decode_attention
from fastllm.ops.dilated_attention import dilated_attention
from fastllm.ops.gae import gae
from fastllm.ops.glu import geglu, swiglu
from fastllm.ops.layer_norm import layer_norm
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.linear_token_logprobs import linear_token_logprobs
from fastllm.ops.merge_attention import merge_attention
from fastllm.ops.rms_norm import rms_norm
from fastllm.ops.rope import rope
from fastllm.ops.token_logprobs import token_logprobs

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "attention",
    "cross_entropy",
    "decode_attention",
    "dilated_attention",
    "gae",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "merge_attention",
    "rms_norm",
    "rope",
    "swiglu",
    "token_logprobs",
]
