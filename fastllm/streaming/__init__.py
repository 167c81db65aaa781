"""Text without end in constant memory: the attention-sink cache, perplexity of long texts, tree attention."""

from fastllm.streaming.cache import StreamingCache
from fastllm.streaming.perplexity import perplexity, token_nll
from fastllm.streaming.tree import Verified, tree_mask, verify_tree

__all__ = ["StreamingCache", "Verified", "perplexity", "token_nll", "tree_mask", "verify_tree"]
