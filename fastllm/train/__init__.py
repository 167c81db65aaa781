"""Training: what a step costs. The trainer itself is not here yet."""

from fastllm.train.throughput import StepFlops, Throughput, peak_flops, step_flops

__all__ = ["StepFlops", "Throughput", "peak_flops", "step_flops"]
