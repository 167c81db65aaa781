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
    "call",
    [
        lambda: laws.critical_dimension(0, 4096),
        lambda: laws.critical_dimension(128, -1),
        lambda: laws.critical_base(4096, 3),
        lambda: laws.max_context(128, 1.0, 4096),
    ],
)
def test_what_has_no_meaning_is_an_error(call):
    with pytest.raises(ConfigError):
        call()
