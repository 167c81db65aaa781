"""Written by `make docs` from bench/results/*/attention.json: what was measured, the fastest first. Not to be edited."""

# (device, dtype, with a backward pass) -> libraries as fastllm.ops._libraries names them, up to ours
FASTEST: dict[tuple[str, str, bool], tuple[str, ...]] = {
    ("AMD EPYC, avx512_bf16", "bfloat16", False): ("fastllm",),
    ("AMD EPYC, avx512_bf16", "bfloat16", True): ("fastllm",),
    ("AMD EPYC, avx512_bf16", "float32", False): ("fastllm",),
    ("AMD EPYC, avx512_bf16", "float32", True): ("fastllm",),
}
