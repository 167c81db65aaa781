"""Which library serves a call of attention: none that would drop an argument, and each told all that was asked."""

import importlib
import random
import sys
import types

import pytest
import torch

import fastllm
from fastllm.ops import _libraries, _op, attention
from tests.ops.test_attention import tensors


def flash(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic):
    """flash_attn_func, from its documentation: (B, L, heads, D), masks aligned to the bottom right."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    i = torch.arange(q.shape[2]).unsqueeze(1) + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])
    left, right = window_size[0], 0 if causal else window_size[1]
    seen = ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))
    scores = softmax_scale * q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.view(-1, 1, 1) * (i - j).abs()
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num()
    out = weights @ v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return out.to(q.dtype).transpose(1, 2)


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    parts = []
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
        assert b - a <= max_seqlen_q
        assert d - c <= max_seqlen_k
        parts.append(flash(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0])
    return torch.cat(parts)


class LowerTriangularMask:
    pass


def memory_efficient(q, k, v, attn_bias, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    assert q.shape[1] == k.shape[1]
    causal = isinstance(attn_bias, LowerTriangularMask)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


@pytest.fixture
def libraries(monkeypatch):
    """Both installed and willing to take CPU tensors."""
    monkeypatch.setattr(_libraries, "_absent", lambda module: "")
    own = types.SimpleNamespace(flash_attn_func=flash, flash_attn_varlen_func=flash_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", own)
    theirs = types.SimpleNamespace(memory_efficient_attention=memory_efficient, LowerTriangularMask=LowerTriangularMask)
    monkeypatch.setitem(sys.modules, "xformers.ops", theirs)
    willing = {n: _libraries.Library(l.refuses, l.run, l.module, True) for n, l in _libraries.LIBRARIES.items()}
    monkeypatch.setattr(_libraries, "LIBRARIES", willing)


def random_call(seed, dtype):
    """A call in which every feature is there one time in five."""
    torch.manual_seed(seed)
    chance = random.Random(seed)

    def maybe(*values):
        return chance.choice(values) if chance.random() < 0.2 else None

    kv_heads, queries = chance.choice([1, 2]), chance.choice([1, 5, 20])
    keys, width = maybe(0, 3, 33) or queries, chance.choice([8, 20])
    heads = kv_heads * (maybe(2, 3) or 1)
    q, k, v = (t.to(dtype) for t in tensors(2, heads, kv_heads, queries, keys, width, maybe(8, 16) or width))
    options = {
        "causal": chance.random() < 0.7,
        "scale": maybe(0.3, -0.2, 0.0),
        "window": maybe(1, 6),
        "softcap": maybe(2.0),
    }
    options["sinks"] = maybe(0, 3) or 0
    options |= {n: torch.rand(heads) for n in ("sink_logits", "alibi_slopes") if maybe(True)}
    if maybe(True):
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        for name, tokens in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
            options[name] = torch.tensor([0, chance.randint(0, tokens), tokens], dtype=torch.int32)
    elif maybe(True):
        options["mask"] = torch.rand(2, 1, queries, keys) > 0.3
    return (q, k, v), options


@pytest.mark.parametrize("library", _libraries.LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_serves_a_call_the_result_is_ours(library, dtype, libraries, monkeypatch):
    served = {library: 0, _libraries.OURS: 0}
    for seed in range(150):
        arguments, options = random_call(seed, dtype)
        expected = attention(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(_libraries, "ranking", lambda *_: ((library, _libraries.OURS), "a test"))
            chosen, _, _ = _op.ROUTES["attention"](*arguments, **options)
            found = attention(*arguments, **options)
        served[chosen] += 1
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{m}\n{options}")  # noqa: B023
    assert served[_libraries.OURS] > 20
    assert (served[library] > 10) != ((library, dtype) == ("flash-attn", torch.float32))


def test_an_older_gpu_is_told_why_flash_attn_does_not_serve_it(libraries, monkeypatch):
    monkeypatch.setattr(_libraries, "ranking", lambda *_: (("flash-attn", _libraries.OURS), "a test"))
    q, k, v = (t.bfloat16() for t in tensors(1, 2, 2, 4, 4, 8, 8))
    assert fastllm.backends.explain("attention", q, k, v).startswith("attention: flash-attn (a test)")
    monkeypatch.setattr(_libraries, "_capability", lambda device: (7, 5))
    told = fastllm.backends.explain("attention", q, k, v)
    assert told.startswith("attention: cpp")
    assert "not flash-attn: it takes GPUs of compute capability 8.0 and later, this one has 7.5" in told


def test_the_capability_is_that_of_the_gpu_where_there_is_one(monkeypatch):
    assert _libraries._capability(torch.device("cpu")) == (8, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert _libraries._capability(torch.device("cuda", 1)) == (7, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _libraries._capability(torch.device("cuda", 1)) == (8, 0)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("mode", ["off", "on", "warn"])
def test_gradients_that_must_repeat_are_left_to_who_repeats_them(mode, learns, libraries, monkeypatch):
    torch.use_deterministic_algorithms(mode != "off", warn_only=mode == "warn")
    q, k, v = (t.bfloat16().requires_grad_(learns) for t in tensors(1, 2, 2, 4, 4, 8, 8))
    told = {}
    for library in _libraries.LIBRARIES:
        monkeypatch.setattr(_libraries, "ranking", lambda *_: ((library, _libraries.OURS), "a test"))  # noqa: B023
        told[library] = fastllm.backends.explain("attention", q, k, v)
        attention(q, k, v)  # flash above checks that it is asked for what the mode asks
    assert told["sdpa"].startswith("attention: sdpa")  # on the CPU; on a GPU see below
    asked = "; asked for its deterministic backward pass" if learns and mode != "off" else ""
    assert told["flash-attn"].startswith(f"attention: flash-attn (a test{asked})")
    refused = "not xformers: its backward pass is not deterministic, and torch.use_deterministic_algorithms is on"
    assert (refused in told["xformers"]) == (learns and mode != "off")
    assert told["xformers"].startswith("attention: xformers") != (learns and mode != "off")


@pytest.mark.parametrize(("warns", "told"), [(True, "repeats to the last bit only where"), (False, "")])
def test_sdpa_of_a_gpu_repeats_its_gradients_only_where_it_must(warns, told):
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.use_deterministic_algorithms(True, warn_only=warns)
    with FakeTensorMode():
        q = torch.empty(1, 2, 4, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        nothing = dict.fromkeys(_libraries.Call._fields[5:])
        refused = _libraries._sdpa_refuses(
            _libraries.Call(q, q, q, True, 1.0, **nothing | {"return_lse": False, "sinks": 0})
        )
    assert told in refused
    assert bool(told) == bool(refused)


def test_torch_compile_is_told_whether_the_mode_only_warns():
    compiled = torch.compile(lambda x: x + 1 if _libraries._only_warned() else x, backend="eager", fullgraph=True)
    for warns in (False, True, False):
        torch.use_deterministic_algorithms(True, warn_only=warns)
        assert compiled(torch.zeros(())) == warns


def test_lse_and_derivatives_of_derivatives_stay_with_ours(libraries, monkeypatch):
    monkeypatch.setattr(_libraries, "ranking", lambda *_: (("sdpa", _libraries.OURS), "a test"))
    q, k, v = tensors(1, 2, 2, 4, 4, 8, 8)
    assert attention(q, k, v, return_lse=True)[1].shape == (1, 2, 4)
    told = fastllm.backends.explain("attention", q, k, v, return_lse=True)
    assert told.startswith("attention: cpp")
    assert "not sdpa: it returns no lse" in told
    tangents = torch.func.jvp(lambda q: attention(q, k, v), (q,), (torch.ones_like(q),))
    assert tangents[1].isfinite().all()
    with fastllm.use_backend("torch"):
        assert "attention: torch (forced)" in fastllm.backends.explain("attention", q, k, v)
    told = fastllm.backends.explain("attention", q, k, v)
    assert told.startswith("attention: sdpa (a test)")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


@pytest.mark.parametrize(
    ("device", "dtype", "learns", "amx", "first"),
    [
        ("cuda", torch.bfloat16, True, False, "sdpa"),
        ("cpu", torch.bfloat16, False, True, "sdpa"),
        ("cpu", torch.bfloat16, True, True, "fastllm"),
        ("cpu", torch.float32, False, True, "fastllm"),
        ("cpu", torch.float16, False, True, "fastllm"),
        ("cpu", torch.float64, False, True, "fastllm"),
        ("cpu", torch.bfloat16, False, False, "fastllm"),
    ],
)
def test_where_nobody_has_measured(device, dtype, learns, amx, first, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    order, why = _libraries._expected(torch.device(device), dtype, learns)
    assert order[0] == first
    assert order[-1] == _libraries.OURS
    assert why


def test_what_was_measured_comes_before_what_is_expected(monkeypatch):
    monkeypatch.setattr(_libraries, "_device_name", lambda device: "a chip")
    monkeypatch.setattr(_libraries, "FASTEST", {("a chip", "bfloat16", True): ("xformers", "fastllm")})
    assert _libraries._rank(torch.device("cpu"), torch.bfloat16, True)[0] == ("xformers", "fastllm")
    assert _libraries._rank(torch.device("cpu"), torch.float32, True)[0] == ("fastllm",)


def test_a_fake_tensor_of_a_gpu_that_is_not_there_has_a_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 2, 4, 8, device="cuda", dtype=torch.bfloat16)
        assert attention(q, q, q, window=2).shape == (1, 2, 4, 8)
        assert attention(q, q, q).shape == (1, 2, 4, 8)


def test_the_bench_times_our_own_kernels_whoever_would_serve_the_call(monkeypatch):
    from bench.attention import _ours

    monkeypatch.setattr(_libraries, "ranking", lambda *_: (("sdpa", _libraries.OURS), "a test"))
    monkeypatch.setitem(_libraries.LIBRARIES, "sdpa", None)  # whoever asks it fails
    q, k, v = tensors(1, 2, 2, 4, 4, 8, 8)
    assert _ours(q, k, v).shape == (1, 2, 4, 8)


def test_a_library_that_does_not_import_or_is_too_old_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    _libraries._absent.cache_clear()
    assert _libraries._absent("flash_attn") == "flash_attn does not import: undefined symbol"
    (tmp_path / "flash_attn.py").write_text("def flash_attn_func(q, k, v, causal=False): pass")
    importlib.invalidate_caches()
    _libraries._absent.cache_clear()
    assert _libraries._absent("flash_attn") == "flash_attn is older than 2.6"
    _libraries._absent.cache_clear()
