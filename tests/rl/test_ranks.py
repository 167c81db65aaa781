"""Two ranks of four are one batch of eight: losses and gradients add up, statistics and decisions are shared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastllm import rl
from fastllm.rl import preference

ROOT = Path(__file__).resolve().parents[2]


def made():
    """The whole batch, the same on every rank."""
    torch.manual_seed(5)
    batch = {name: torch.randn(8, 6) for name in ("old", "advantages", "ref", "values", "returns")}
    mask = torch.rand(8, 6) < 0.7
    mask[4:, 2:] = False  # so that the ranks have unequal shares
    return batch, mask, torch.randn(8, 6, 16), torch.randn(41, 16) * 0.5, torch.randint(41, (8, 6))


def check_shared_statistics(rank, rows):
    batch, mask, *_ = made()
    x = batch["advantages"] + 3
    for options in ({}, {"shift_mean": False}, {"unbiased": True}):
        found = rl.whiten(x[rows], mask[rows], distributed=True, **options)
        torch.testing.assert_close(found, rl.whiten(x, mask, **options)[rows])
    rewards = x[:, :3].reshape(-1)
    mine = slice(12 * rank, 12 * rank + 12)
    for kind in rl.advantages.GROUP_KINDS:
        found = rl.group_advantages(rewards[mine], 4, kind=kind, distributed=True)
        torch.testing.assert_close(found, rl.group_advantages(rewards, 4, kind=kind)[mine])
    desirable = x[:, 0] > 3
    logps, ref = x[:, 1].requires_grad_(), x[:, 2].detach()
    whole = rl.kto_loss(logps, ref, desirable)
    part = rl.kto_loss(logps[rows], ref[rows], desirable[rows], num_items=8, distributed=True)
    torch.testing.assert_close(part.stats["kl"], whole.stats["kl"])
    assert_adds_up(part.loss, whole.loss, [logps])


def check_decisions(rank, rows):
    kl = 0.4 if rank == 0 else 0.0  # the mean is 0.2
    assert rl.should_stop(kl, 0.13)
    assert rl.should_stop(torch.tensor(kl), 0.13)
    assert not rl.should_stop(kl, 0.14)
    assert rl.should_stop(kl, 0.19, count=torch.tensor(30 if rank == 0 else 10))  # by tokens it is 0.3
    assert rl.should_stop(float("nan") if rank else 0.0, 0.1)
    assert not rl.should_stop(kl if rank == 0 else float("nan"), 0.3, count=1 - rank)
    assert not rl.should_stop(kl, None)


def check_losses(rank, rows):
    batch, mask, hidden, weight, tokens = made()
    for level in ("token", "sequence"):
        for aggregation, items in (
            ("token-mean", mask.sum()), ("seq-mean-token-sum", mask.any(-1).sum()),
            ("seq-mean-token-mean", mask.any(-1).sum()), ("token-sum-norm", torch.tensor(48.0)),
        ):  # fmt: skip
            learnt = [t.clone().requires_grad_() for t in (hidden, weight, batch["values"])]

            def loss(rows, learnt=learnt, level=level, aggregation=aggregation, items=items):
                h, w, values = learnt
                return rl.linear_ppo_loss(
                    h[rows], w, tokens[rows], batch["old"][rows] - 4, batch["advantages"][rows], mask[rows],
                    values=values[rows], returns=batch["returns"][rows], ref_logprobs=batch["ref"][rows] - 4, kl_coef=0.1,
                    entropy_coef=0.01, level=level, aggregation=aggregation, num_items=items,
                ).loss  # fmt: skip

            assert_adds_up(loss(rows), loss(slice(None)), learnt)
    learnt = [t.clone().requires_grad_() for t in (hidden, weight)]
    ref = batch["ref"][:, 0]
    pair = torch.tensor([2 * rank, 2 * rank + 1, 2 * rank + 4, 2 * rank + 5])
    for kind in preference.DPO_KINDS:

        def loss(rows, items=None, kind=kind):
            half = len(rows) // 2
            return rl.linear_dpo_loss(
                learnt[0][rows], learnt[1], tokens[rows], mask[rows], ref[rows[:half]], ref[rows[half:]], kind=kind,
                num_items=items,
            ).loss  # fmt: skip

        assert mask[:, 0].any()
        counted = (mask[:4].any(-1) & mask[4:].any(-1)).sum() if kind == "ipo" else 4
        assert_adds_up(loss(pair, counted), loss(torch.arange(8)), learnt)


def assert_adds_up(part, whole, learnt):
    expected = torch.autograd.grad(whole, learnt, retain_graph=True)
    assert all(g.any() for g in expected)
    found = torch.autograd.grad(part, learnt, retain_graph=True)
    for ours, theirs in zip((part.detach().clone(), *found), (whole.detach(), *expected)):
        dist.all_reduce(ours := ours.contiguous())
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def main(rank, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    rows = slice(4 * rank, 4 * rank + 4)
    for check in (check_shared_statistics, check_decisions, check_losses):
        check(rank, rows)
    dist.destroy_process_group()
    sys.stdout.write(f"rank {rank} agrees\n")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_are_one_batch(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.rl.test_ranks"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, text in enumerate(said):
        assert f"rank {rank} agrees" in text, text


def test_one_process_needs_no_group():
    assert not dist.is_initialized()
    x, mask = torch.randn(5), torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(rl.whiten(x, mask, distributed=True), rl.whiten(x, mask))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
