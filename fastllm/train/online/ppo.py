"""Stage ppo: proximal policy optimisation with a critic, or with GRPO's and RLOO's comparisons in its place."""

from __future__ import annotations

from fastllm.train.online.course import Course
from fastllm.train.online.experience import judged
from fastllm.train.online.rollout import sample
from fastllm.train.online.update import update


def iterate(course: Course) -> dict[str, float]:
    """One iteration: sample responses, score them, learn from them. Returns what metrics.jsonl tells of it."""
    options, engine, clock = course.options, course.engine, course.clock

    with clock.part("rollout"):
        asked = [prompt for prompt in course.next_prompts() for _ in range(options.group_size or 1)]
        rollout = sample(
            engine, course.tokenizer, asked, chunk=options.rollout_chunk_size or len(asked),
            max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        )  # fmt: skip
        course.work.sampled(rollout.lengths)
    with clock.part("score"):
        kl_coef = course.kl.value if course.kl else options.kl_coef or 0.0
        experience = judged(engine, rollout, options, course.reward, course.normaliser, kl_coef)
        course.work.judged(rollout.lengths)
        if course.kl and experience.kl is not None:
            course.kl.update(experience.kl, len(rollout) * engine.world)
    with clock.part("train"):
        warming = course.step < options.critic_warmup_steps and experience.values is not None
        course.set_learning_rates(actor=not warming)
        stats = update(
            engine, experience, options, course.micro_batch, course.work, warming=warming, texts=course.next_texts
        )

    distance = {} if experience.kl is None else {"kl": experience.kl, "kl_coef": kl_coef}
    return course.told(rollout, experience.scores) | stats | distance
