"""The errors a user can catch. Bad arguments to an op raise ValueError or TypeError instead."""


class FastLLMError(Exception):
    """Base of every error that fastllm raises on its own account."""

    alone = False  # whether of several processes this one may be the only one to know of it


class PatchError(FastLLMError):
    """A requested op could not be applied to a model."""


class BackendError(FastLLMError):
    """A forced backend cannot serve a call."""


class ConfigError(FastLLMError):
    """A configuration has no meaning here."""


class DataError(FastLLMError):
    """Training data is missing or malformed."""


class CheckpointError(FastLLMError):
    """A checkpoint cannot be written or read."""
