"""Stage conditional: scores in prompts, and answers that follow them."""

import pytest
import torch

from fastllm.train.online import conditional
from fastllm.train.online.rollout import sample

from .conftest import trained
from .rewards import printable

pytest.importorskip("transformers")


@pytest.fixture
def settings(settings):
    settings.pop("kl_coef")
    return {**settings, "stage": "conditional", "rollout_batch_size": 32, "max_length": 128}


def test_the_reward_rises_and_the_score_in_the_prompt_is_why(settings, tmp_path):
    template = tmp_path / "short.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    more = {
        "rollout_batch_size": 256, "per_device_train_batch_size": 32, "learning_rate": 5e-3, "max_steps": 12, "pool_iterations": 6,
        "max_new_tokens": 6, "chat_template": str(template), "save_strategy": "no",
    }  # fmt: skip
    run, _, log = trained(settings, reward="tests.train.online.rewards:printable", **more)
    rewards = [line["reward"] for line in log]
    assert sum(rewards[-2:]) / 2 > 0.15 + sum(rewards[:2]) / 2
    course = run.course
    means = {}
    for level in (1, 5):
        asked = [conditional.conditioned(course, one, level) for one in course.prompts.at(0, 256)]
        found = sample(course.engine, course.tokenizer, asked, chunk=256, max_new_tokens=6, temperature=1.0)
        means[level] = sum(printable([], found.texts, [])) / 256
    assert means[5] > means[1] + 0.05


def test_levels_are_quantiles_of_the_known_scores():
    known = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9])
    assert [conditional.level_of(s, known, 5) for s in (-1.0, 0.0, 0.1, 0.2, 0.4, 0.9)] == [1, 2, 2, 3, 4, 5]
    same = torch.full((4,), 0.7)
    assert conditional.level_of(0.7, same, 5) == 5


def test_prompts_end_with_the_score_and_it_survives_truncation(settings):
    from fastllm.train import config
    from fastllm.train.online.run import Run

    run = Run(config.parse(settings))
    one = run.course.next_prompts()[0]
    text = run.tokenizer.decode(conditional.conditioned(run.course, one, 4).ids)
    assert text.endswith("\n\nScore: 4 of 5\n\n### Assistant:\n")
    assert one.row["prompt"] in text
