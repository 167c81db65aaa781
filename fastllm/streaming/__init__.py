"""Text without end in constant memory: the attention-sink cache, perplexity of long texts, tree attention."""

from fastllm.streaming.cache import StreamingCache

__all__ = ["StreamingCache"]
