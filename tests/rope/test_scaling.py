"""Frequencies against Transformers' own functions, the formulas by hand, and their invariances."""

import math

import pytest
import torch

from fastllm import rope
from fastllm.errors import ConfigError

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

PLAIN = {"head_dim": 64, "base": 10000.0, "original_length": 2048}
EXTENDED = [1.0 + 0.1 * i for i in range(32)]


def theta(base=10000.0, dim=64):
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def of_transformers(kind, length=None, **parameters):
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        ("linear", {"factor": 8.0}, {"factor": 8.0}),
        ("dynamic", {"factor": 2.0, "length": 6000}, {"factor": 2.0, "length": 6000}),
        ("dynamic", {"factor": 2.0, "length": 100}, {"factor": 2.0, "length": 100}),
        ("yarn", {"factor": 8.0}, {"factor": 8.0, "original_max_position_embeddings": 2048}),
        ("yarn", {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
         {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 2048}),
        ("yarn", {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
         {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, "original_max_position_embeddings": 2048}),
        ("llama3", {"factor": 8.0},
         {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}),
        *(
            ("longrope", {"factor": 4.0, "short_factor": [1.0] * 32, "long_factor": EXTENDED, "length": n},
             {"factor": 4.0, "short_factor": [1.0] * 32, "long_factor": EXTENDED, "length": n,
              "original_max_position_embeddings": 2048})
            for n in (2048, 2049)
        ),
    ],
)  # fmt: skip
def test_agrees_with_transformers(method, ours, theirs):
    found = rope.scaling(method, **PLAIN, **ours)
    inv_freq, attention_factor = of_transformers(method, **theirs)
    torch.testing.assert_close(found.inv_freq, inv_freq, rtol=1e-6, atol=1e-6)
    assert found.attention_factor == pytest.approx(attention_factor, rel=1e-6)


def test_default_and_another_base():
    torch.testing.assert_close(rope.scaling("default", **PLAIN).inv_freq.double(), theta(), rtol=1e-7, atol=0)
    found = rope.scaling("abf", **PLAIN, adjusted_base=5e5).inv_freq
    torch.testing.assert_close(found.double(), theta(5e5), rtol=1e-7, atol=0)
    torch.testing.assert_close(rope.scaling("abf", **{**PLAIN, "base": 5e5}).inv_freq, found)


@pytest.mark.parametrize("method", ["ntk", "ntk_mixed"])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_ntk_stretches_the_slowest_pair_by_the_factor_and_the_fastest_least(method, factor):
    stretched = theta() / rope.scaling(method, **PLAIN, factor=factor).inv_freq.double()
    assert stretched[-1].item() == pytest.approx(factor, rel=1e-6)
    assert (stretched.diff() >= -1e-6).all()
    assert stretched[0] < 1.3 if method == "ntk_mixed" else stretched[0].item() == pytest.approx(1.0)


def test_dynamic_is_the_circulated_patch_at_2048_tokens_and_a_factor_of_2():
    """The patch: alpha = n/1024 - 1, base = 10000 * alpha^(d/(d-2))."""
    for length in (3000, 8192):
        alpha = length / 1024 - 1
        expected = theta(10000 * alpha ** (64 / 62))
        found = rope.scaling("dynamic", **PLAIN, factor=2.0, length=length)
        torch.testing.assert_close(found.inv_freq.double(), expected, rtol=1e-6, atol=0)


def test_a_length_stands_for_a_factor():
    for method in ("linear", "ntk", "yarn", "llama3"):
        by_length, by_factor = (rope.scaling(method, **PLAIN, **how) for how in ({"length": 8192}, {"factor": 4.0}))
        assert torch.equal(by_length.inv_freq, by_factor.inv_freq)
        assert by_length.attention_factor == by_factor.attention_factor


@pytest.mark.parametrize("method", rope.METHODS)
def test_frequencies_are_fp32_positive_and_none_is_faster_than_it_was(method):
    more = {"short_factor": [1.0] * 32, "long_factor": EXTENDED} if method == "longrope" else {}
    found = rope.scaling(method, **PLAIN, factor=4.0, length=8192, **more)
    assert found.inv_freq.dtype == torch.float32
    assert found.inv_freq.shape == (32,)
    assert (found.inv_freq > 0).all()
    assert (found.inv_freq.double() <= theta() * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rope", {}, "method must be one of default, linear, ntk"),
        ("yarn", {}, "yarn needs a factor, or a length"),
        ("linear", {"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ("linear", {"factor": 2.0, "beta_fast": 3}, "linear has no parameter 'beta_fast': it takes no parameters"),
        ("yarn", {"factor": 2.0, "beta": 3}, "it takes beta_fast, beta_slow"),
        ("yarn", {"factor": 2.0, "beta_fast": 1, "beta_slow": 2}, "beta_fast must be at least beta_slow"),
        ("longrope", {"factor": 2.0, "short_factor": [1.0]}, "short_factor must hold a factor .* 32 pairs, got 1"),
        ("default", {"head_dim": 7}, "head_dim must be an even number"),
        ("default", {"original_length": 0}, "original_length must be greater than 0"),
        ("default", {"original_length": None}, "original_length must be given"),
        ("default", {"original_length": "64"}, "original_length must be a number, got '64'"),
        ("default", {"base": float("inf")}, "base must be greater than 1 and finite, got inf"),
        ("dynamic", {"factor": 2.0, "length": float("inf")}, "length must be greater than 0 and finite, got inf"),
        ("yarn", {"factor": 2.0, "beta_slow": "1"}, "beta_slow must be a number, got '1'"),
        ("dynamic", {"factor": 2.0, "length": -5}, "length must be greater than 0"),
    ],
)
def test_what_has_no_meaning_is_one_clear_error(method, options, message):
    with pytest.raises(ConfigError, match=message):
        rope.scaling(method, **{**PLAIN, **options})


def test_alibi_slopes_are_the_published_ones():
    """The rule of the authors' own code, restated: a geometric series for powers of two, and the closest two mixed for others."""

    def published(heads):
        if math.log2(heads).is_integer():
            start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
            return [start * start**i for i in range(heads)]
        closest = 2 ** math.floor(math.log2(heads))
        return published(closest) + published(2 * closest)[0::2][: heads - closest]

    for heads in (1, 2, 3, 8, 12, 40, 64):
        torch.testing.assert_close(
            rope.alibi_slopes(heads).double(), torch.tensor(published(heads), dtype=torch.float64)
        )
    with pytest.raises(ConfigError, match="heads"):
        rope.alibi_slopes(0)
