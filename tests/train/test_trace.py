"""A trace summed up: made by hand, with seconds known beforehand; and every kind of operation by its name."""

import gzip
import json

import pytest

from fastllm.train import trace


def event(name, begin, length, category="cpu_op", thread=1, **arguments):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": length,
        "pid": 7,
        "tid": thread,
        "args": arguments,
    }


def mark(name, begin, length):
    return event(name, begin, length, "user_annotation")


def written(tmp_path, events, name="t.json"):
    path = tmp_path / name
    text = json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]})
    with gzip.open(path, "wt") if name.endswith("gz") else open(path, "w") as file:
        file.write(text)
    return path


def microseconds(profile):
    return {kind: round(share * profile.seconds * 1e6, 3) for kind, share in profile.shares.items() if share}


HOST = [
    mark("ProfilerStep#3", 0, 2000),
    mark(trace.DATA, 0, 40),  # ended by a log, so no part of the step
    event("aten::add", 40, 60),
    mark(trace.DATA, 100, 100),
    event("aten::cat", 110, 50),  # a batch is made
    mark(trace.STEP, 200, 800),
    event("aten::linear", 210, 110),
    event("aten::t", 212, 8),
    event("aten::mm", 220, 100, **{"Input Dims": [[8, 4], [4, 6]]}),
    event("aten::scaled_dot_product_attention", 330, 70,
          **{"Input Dims": [[1, 2, 8, 4]] * 3 + [[]] * 5, "Concrete Inputs": ["", "", "", "", "0.", "True", "", "False"]}),
    event("aten::bmm", 340, 50, **{"Input Dims": [[2, 8, 4], [2, 4, 8]]}),  # part of it
    event("autograd::engine::evaluate_function: MmBackward0", 420, 200, thread=2),
    event("MmBackward0", 430, 180, thread=2),
    event("aten::mm", 440, 100, thread=2, **{"Input Dims": [[6, 8], [8, 4]]}),
    event("gloo:all_reduce", 500, 200, thread=2),  # 40 beneath the product, and beyond its caller
    mark("Optimizer.step#AdamW.step", 800, 150),
    event("aten::_fused_adamw_", 810, 100),
    event("aten::mul", 1010, 500),  # after the step
]  # fmt: skip


def test_each_moment_of_a_step_has_one_kind(tmp_path):
    profile = trace.read(written(tmp_path, HOST, "t.json.gz"))
    assert (profile.steps, profile.device, profile.seconds) == (1, "cpu", pytest.approx(900e-6))
    assert microseconds(profile) == {
        "data wait": 100, "matmul": 102 + 100, "element-wise": 8, "attention": 70, "communication": 160, "optimizer": 150,
        "idle": 900 - 100 - 202 - 8 - 70 - 160 - 150,
    }  # fmt: skip
    assert sum(profile.shares.values()) == pytest.approx(1)
    assert list(profile.shares) == list(trace.KINDS)
    assert profile.communication_s == pytest.approx(200e-6)
    assert profile.matmul_flops == 2 * 8 * 4 * 6 + 2 * 6 * 8 * 4
    assert profile.attention_flops == 2 * 2 * (4 + 4) * 8 * 8 / 2  # half of the square
    named = {(one.name, one.kind): one for one in profile.operations}
    assert named["aten::mm", "matmul"].calls == 2
    assert named["aten::bmm", "attention"].seconds == pytest.approx(50e-6)
    assert named["aten::scaled_dot_product_attention", "attention"].seconds == pytest.approx(20e-6)


def kernel(name, begin, length, stream=7, category="kernel", **arguments):
    return event(name, begin, length, category, f"stream {stream}", **arguments)


GPU = [
    mark(trace.DATA, 0, 100),
    mark(trace.STEP, 100, 900),
    event("aten::mm", 100, 10, **{"External id": 1, "Input Dims": [[8, 4], [4, 6]]}),
    event("fastllm::rms_norm", 120, 10, **{"External id": 2}),
    event("fastllm::attention", 130, 20, **{"External id": 3}),
    event("aten::copy_", 132, 5, **{"External id": 4}),
    mark("Optimizer.step#AdamW.step", 150, 30),
    event("aten::_foreach_add_", 155, 10, **{"External id": 5}),
    event("somebody::fused", 190, 5, **{"External id": 6}),
    kernel("volta_sgemm", 50, 20, **{"External id": 99}),  # of the step before, while this one waits for data
    kernel("ampere_bf16_s16816gemm", 200, 100, **{"External id": 1}),
    kernel("_forward_kernel", 300, 100, **{"External id": 2}),
    kernel("_kernel", 400, 50, **{"External id": 3}),
    kernel("Memcpy DtoD", 450, 10, category="gpu_memcpy", **{"External id": 4}),
    kernel("void multi_tensor_apply_kernel<...>", 500, 100, **{"External id": 5}),
    kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 250, 100, 20, **{"External id": 1}),  # 50 beneath the product
    kernel("cutlass::Kernel2<...>", 700, 30, **{"External id": 6}),
    kernel("triton_poi_fused__scaled_dot_product_flash_attention_mul_3", 730, 20),
    event("ProfilerStep#3", 0, 2000, "gpu_user_annotation", "stream 7"),
    event("cudaLaunchKernel", 100, 700, "cuda_runtime"),
]  # fmt: skip


def test_on_a_gpu_the_kernels_count_and_are_of_the_kind_of_what_launched_them(tmp_path):
    profile = trace.read(written(tmp_path, GPU))
    assert profile.device == "gpu"
    assert microseconds(profile) == {
        "matmul": 20 + 100 + 30, "element-wise": 100 + 20, "attention": 60, "optimizer": 100, "data wait": 80,
        "idle": 900 - 100 - 100 - 60 - 100 - 30 - 20,
    }  # fmt: skip
    assert profile.communication_s == pytest.approx(100e-6)  # hidden beneath computation
    assert profile.matmul_flops == 2 * 8 * 4 * 6


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "matmul"),
        ("aten::addmm_", "matmul"),
        ("aten::linear", "matmul"),
        ("aten::matmul", "matmul"),
        ("aten::_grouped_mm", "matmul"),
        ("aten::_scaled_mm", "matmul"),
        ("aten::convolution_backward", "matmul"),
        ("aten::mkldnn_convolution", "matmul"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("fastllm::attention", "attention"),
        ("fastllm::attention_backward", "attention"),
        ("fastllm::decode_attention", "attention"),
        ("fastllm::merge_attention", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_scaled_dot_product_efficient_attention_backward", "attention"),
        ("flash_attn::_flash_attn_varlen_forward", "attention"),
        ("FlashAttnVarlenFunc", "attention"),
        ("fastllm::rms_norm", "element-wise"),
        ("fastllm::glu_backward", "element-wise"),
        ("fastllm::softmax_gradient_", "element-wise"),
        ("aten::_foreach_norm", "element-wise"),
        ("aten::embedding_dense_backward", "element-wise"),
        ("aten::mul", "element-wise"),
        ("aten::mm_of_mine", "element-wise"),
        ("c10d::allreduce_", "communication"),
        ("c10d::_allgather_base_", "communication"),
        ("_c10d_functional::all_gather_into_tensor", "communication"),
        ("record_param_comms", "communication"),
        ("nccl:all_reduce", "communication"),
        ("gloo:all_reduce", "communication"),
        ("torch.distributed.ddp.reducer::copy_bucket_to_grad", "communication"),
        ("MmBackward0", None),
        ("_EagerBackward", None),
        ("autograd::engine::evaluate_function: MmBackward0", None),
        ("torch::autograd::AccumulateGrad", None),
    ],
)
def test_operations_have_the_kind_of_their_name(name, kind):
    assert trace._kind(name, "cpu_op", None) == kind


def test_what_attention_the_optimizer_and_communication_are_made_of_is_theirs():
    assert trace._kind("aten::bmm", "cpu_op", "attention") == "attention"
    assert trace._kind("aten::mm", "cpu_op", "optimizer") == "optimizer"
    assert trace._kind("aten::copy_", "cpu_op", "communication") == "communication"
    assert trace._kind("c10d::allreduce_", "cpu_op", "optimizer") == "communication"
    assert trace._kind("my attention", "user_annotation", None) is None
    assert trace._kind("aten::view", "cpu_op", "matmul") == "element-wise"


def test_what_is_no_trace_is_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no whole training step"):
        trace.read(written(tmp_path, [event("aten::mm", 0, 1)]))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is no trace of torch\.profiler"):
        trace.read(tmp_path / "other.json")
