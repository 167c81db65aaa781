"""The numbers that the paper gives."""

import pytest

from fastllm.errors import ConfigError
from fastllm.rope import laws


def test_the_papers_numbers_for_llama_2():
    assert laws.critical_dimension(128, 4096) == 92
    assert laws.critical_base(4096, 16384) == pytest.approx(71738, rel=1e-3)
    assert laws.max_context(128, 1e6, 4096) == pytest.approx(129_000, rel=1e-2)
    assert [round(base) for base in laws.small_bases(4096)] == [2608, 1304, 652]


def test_limits():
    assert laws.critical_dimension(128, 10**9) == 128
    assert laws.critical_dimension(128, 6) == 0
    assert laws.critical_base(4096, 4096) == pytest.approx(10000)
    assert laws.max_context(128, 1e6, 4096) < laws.max_context(128, 5e6, 4096)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: laws.critical_dimension(0, 4096), "head_dim must be a finite number greater than 0, got 0"),
        (lambda: laws.critical_dimension(128, -1), "train_length must be .* greater than 0, got -1"),
        (lambda: laws.critical_dimension("128", 4096), "head_dim must be .*, got '128'"),
        (lambda: laws.critical_base(4096, 3), "tuned_length must be .* greater than 6.283, got 3"),
        (lambda: laws.max_context(128, 1.0, 4096), "base must be .* greater than 1, got 1.0"),
        (lambda: laws.max_context(128, float("inf"), 4096), "base must be .*, got inf"),
    ],
)
def test_what_has_no_meaning_is_an_error(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
