"""Rows of a suite as the tests of plots, report and compare need them."""

MACHINE = {
    "device": "cpu", "gpu": None, "driver": None, "cuda": None, "cpu": "A CPU", "cores": 4, "threads": 4,
    "torch": "2.13.0", "triton": None, "transformers": None, "liger-kernel": None, "instruction_set": "avx2",
    "forced_backend": None, "commit": "0123456789abcdef", "command": "python -m bench kernels", "date": "2026-01-02T03:04:05",
}  # fmt: skip


def contestant(name, ms, ours, limit=1.0, spread=0.02):
    return {
        "name": name, "first_ms": 5 * ms, "error": 1e-3, "median_ms": ms, "gb_per_s": 1 / ms, "gflop_per_s": 0.0,
        "quartile_ms": [ms * (1 - spread), ms * (1 + spread)], "share_of_limit": limit / ms, "extra_bytes": 3_000_000,
        "ratio": ms / ours,
    }  # fmt: skip


def row(op="rms_norm", shape="64x4096", which="forward", dtype="bf16", length=None, spread=0.02, missing=(), **times):
    """``fastllm=2.0, eager=6.0``: the contestants and their milliseconds; "_" stands for "." in a name."""
    found = [contestant(n.replace("_", "."), ms, times["fastllm"], spread=spread) for n, ms in times.items()]
    found += [{"name": name, "missing": "not installed"} for name in missing]
    return {
        "suite": "kernels", "case": f"{op} {shape} {dtype} {which}", "op": op, "shape": shape, "length": length,
        "dtype": dtype, "pass": which, "runs": 20, "bytes": 1_000_000, "flops": 0, "copy_gb_per_s": 1.0,
        "limit_ms": 1.0, "limited_by": "memory", "contestants": found, "machine": MACHINE,
    }  # fmt: skip


def wrong(row):
    """The row, had our result been wrong."""
    ours = {"name": "fastllm", "first_ms": 5.0, "error": 9.0, "allowed": 1.0, "wrong": True}
    others = [{k: v for k, v in found.items() if k != "ratio"} for found in row["contestants"][1:]]
    return row | {"contestants": [ours, *others]}


def step(kind, seconds, peak=2_000_000_000, spread=0.02):
    return {
        "suite": "train", "case": "train step llama", "contestant": kind, "parameters": 1, "runs": 10, "median_s": seconds,
        "quartile_s": [seconds * (1 - spread), seconds * (1 + spread)], "tokens_per_s": 2048 / seconds, "peak_bytes": peak,
        "trainable_tokens_per_s": 2047 / seconds, "tflops": 1.7 / seconds, "mfu": None, "hfu": None, "of_matmul": 0.5,
        "checkpointing": False, "optimizer": "SGD",
        "peak_over_built_bytes": None, "first_s": 9.0, "largest_loss_difference": 1e-4, "machine": MACHINE,
    }  # fmt: skip


def steps(unpatched=4.0, patched=2.0):
    return [step("unpatched", unpatched), step("torch.compile", 4.1), step("patched", patched, 1_000_000_000)]
