"""Written by `make docs` from bench/results/*/attention.json: what was measured, the fastest first. Not to be edited."""

# (device, dtype, with a backward pass) -> libraries as fastllm.ops._libraries names them, up to ours
FASTEST: dict[tuple[str, str, bool], tuple[str, ...]] = {}
