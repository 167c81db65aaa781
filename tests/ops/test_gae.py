import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import gae
from tests.ops.harness import assert_close_as_eager, each_backend, each_dtype


def plain(rewards, values, gamma=1.0, lam=0.95, mask=None, dones=None):
    """The paper's sums over one row at a time: A_t = sum over valid u >= t of (gamma lam)^(u - t) delta_u, with every
    masked token taken out of the row first."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(rewards.shape[0]):
        kept = range(rewards.shape[1]) if mask is None else mask[b].nonzero().flatten().tolist()
        r, v = rewards[b, list(kept)], values[b, list(kept)]
        alive = torch.ones_like(r) if dones is None else 1 - dones[b, list(kept)].to(r)
        delta = r + gamma * alive * torch.cat([v[1:], v.new_zeros(1)])[: len(r)] - v
        for n, t in enumerate(kept):
            factors = torch.cat([r.new_ones(1), (gamma * lam * alive[n:-1]).cumprod(0)]) if n + 1 < len(r) else 1
            advantages[b, t] = (factors * delta[n:]).sum()
            returns[b, t] = advantages[b, t] + v[n]
    return advantages, returns


def some(rows, length, dtype=torch.float32, masked=0.0, done=0.0, offset=0.0):
    """rewards and values, and the optional tensors; what the mask hides is NaN."""
    rewards, values = torch.randn(rows, length).to(dtype), (torch.randn(rows, length) + offset).to(dtype)
    how = {}
    if masked:
        how["mask"] = torch.rand(rows, length) >= masked
        rewards[~how["mask"]], values[~how["mask"]] = float("nan"), float("nan")
    if done:
        how["dones"] = torch.rand(rows, length) < done
    return rewards, values, how


def on(device, how):
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in how.items()}


def check(rewards, values, backend, device, exact=plain, **how):
    """Against `exact` in fp64, by the project's tolerance rule; eager is the definition in the inputs' own dtype."""
    reference = exact(rewards.double(), values.double(), **how)
    with fastllm.use_backend("torch"):
        eager = gae(rewards, values, **how)
    with fastllm.use_backend(backend):
        ours = gae(rewards.to(device), values.to(device), **on(device, how))
    for name, a, b, c in zip(("advantages", "returns"), ours, eager, reference):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        assert_close_as_eager(a, b, c, rewards.dtype, name)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 60), (17, 33)], ids=str)
@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("done", [0.0, 0.1])
def test_matches_the_papers_sums_in_fp64(backend, device, dtype, shape, masked, done):
    rewards, values, how = some(*shape, dtype, masked, done)
    check(rewards, values, backend, device, gamma=0.98, lam=0.9, **how)


@each_backend
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.0, 0.95), (0.9, 0.0), (0.0, 0.0)], ids=str)
def test_the_ends_of_gamma_and_lambda(backend, device, gamma, lam):
    rewards, values, how = some(5, 21, masked=0.3, done=0.1)
    check(rewards, values, backend, device, gamma=gamma, lam=lam, **how)


def by_definition(rewards, values, **how):
    with fastllm.use_backend("torch"):
        return gae(rewards, values, **how)


@each_backend
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_longer_than_a_block(backend, device, rows):
    rewards, values, how = some(rows, 2500, masked=0.3, done=0.001, offset=2.0)
    how["mask"][0, 100:2300] = False  # a gap of more than a block
    rewards, values = rewards.where(how["mask"], torch.nan), values.where(how["mask"], torch.nan)
    check(rewards, values, backend, device, by_definition, **how)


@each_backend
def test_a_gap_carries_the_state_unchanged(backend, device):
    rewards, values, _ = some(4, 6)
    spread = torch.full((4, 15), torch.nan), torch.full((4, 15), torch.nan)
    at = torch.tensor([1, 2, 5, 9, 10, 13])
    spread[0][:, at], spread[1][:, at] = rewards, values
    mask = torch.zeros(4, 15, dtype=torch.bool)
    mask[:, at] = True
    with fastllm.use_backend(backend):
        dense = gae(rewards.to(device), values.to(device), lam=0.9)
        gaps = gae(*(x.to(device) for x in spread), lam=0.9, mask=mask.to(device))
    for a, b in zip(dense, gaps):
        torch.testing.assert_close(b[:, at], a, rtol=1e-6, atol=1e-6)
        assert torch.equal(b[~mask.to(device)], torch.zeros(4 * 9, device=device))


@each_backend
def test_packed_is_padded(backend, device):
    lengths = [3, 0, 1, 700, 0, 12, 130]
    rewards, values, how = some(len(lengths), max(lengths), masked=0.3, done=0.05)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = {name: t[inside].to(device) for name, t in how.items()}
    how["mask"] = how["mask"] & inside
    with fastllm.use_backend(backend):
        padded = gae(rewards.to(device), values.to(device), **on(device, how))
        flat = gae(rewards[inside].to(device), values[inside].to(device), **packed, cu_seqlens=bounds.to(device))
    for a, b in zip(padded, flat):
        torch.testing.assert_close(b, a[inside.to(device)], rtol=1e-6, atol=1e-6)


@each_backend
def test_sequences_of_a_pack_do_not_touch_one_another(backend, device):
    rewards, values, _ = some(1, 40)
    bounds = torch.tensor([0, 15, 40], dtype=torch.int32, device=device)
    with fastllm.use_backend(backend):
        clean = gae(rewards[0].to(device), values[0].to(device), cu_seqlens=bounds)
        values[0, 15:] = torch.nan
        rewards[0, 20] = torch.inf
        other = gae(rewards[0].to(device), values[0].to(device), cu_seqlens=bounds)
    for a, b in zip(clean, other):
        assert torch.equal(a[:15], b[:15])


@each_backend
def test_nan_and_inf_come_out_as_the_definition_has_them(backend, device):
    rewards, values, _ = some(6, 20)
    rewards[0, 7], rewards[1, 8], values[2, 9], values[3, 10], values[4, 19] = (
        torch.nan, torch.inf, torch.nan, -torch.inf, torch.inf,
    )  # fmt: skip
    check(rewards, values, backend, device, by_definition)
    check(rewards, values, backend, device, by_definition, gamma=0.5, lam=0.0)


@each_backend
@pytest.mark.parametrize("length", [6, 300])
def test_an_end_takes_nothing_of_what_follows(backend, device, length):
    rewards, values, _ = some(3, length)
    dones = torch.zeros(3, length, dtype=torch.bool)
    dones[:, length // 2] = True
    wrong = values.clone()
    wrong[:, length // 2 + 1 :] = float("nan")
    with fastllm.use_backend(backend):
        for name, how in {"dones": {"dones": dones.to(device)}, "gamma": {"gamma": 0.0}, "lam": {"lam": 0.0}}.items():
            whole = gae(rewards.to(device), values.to(device), **how)
            cut = gae(rewards.to(device), wrong.to(device), **how)
            last = length // 2 - (name == "lam")  # whose next value is a number
            for a, b in zip(whole, cut):
                assert torch.equal(a[:, : last + 1], b[:, : last + 1]), name
        unread = rewards.clone()
        unread[:, length // 2 + 1 :] = float("nan")
        for a, b in zip(
            gae(rewards.to(device), values.to(device), lam=0.0), gae(unread.to(device), values.to(device), lam=0.0)
        ):
            assert torch.equal(a[:, : length // 2 + 1], b[:, : length // 2 + 1])


@each_backend
def test_a_nan_reaches_back_however_little_of_a_number_would(backend, device):
    rewards, values, _ = some(2, 3000)
    rewards[:, -1] = torch.nan
    check(rewards, values, backend, device, by_definition, gamma=0.5, lam=0.5)


@each_backend
def test_no_valid_token_and_zero_sizes_give_zeros(backend, device):
    nothing = torch.full((3, 4), torch.nan, device=device)
    with fastllm.use_backend(backend):
        for result in gae(nothing, nothing, mask=torch.zeros(3, 4, dtype=torch.bool, device=device)):
            assert torch.equal(result, torch.zeros(3, 4, device=device))
        for shape in [(0, 4), (3, 0), (0,)]:
            empty = torch.empty(shape, device=device)
            assert all(result.shape == shape for result in gae(empty, empty))
        bounds = torch.zeros(1, dtype=torch.int32, device=device)
        assert gae(empty, empty, cu_seqlens=bounds)[0].shape == (0,)


@each_backend
def test_no_gradient_and_strides_and_dtypes_of_their_own(backend, device):
    rewards, values, how = some(5, 24, masked=0.3)
    expected = plain(rewards.double(), values.bfloat16().double(), **how)
    rewards = rewards.mT.contiguous().mT.to(device).requires_grad_()
    values = values.bfloat16().repeat(1, 2)[:, :24].to(device).requires_grad_()
    mask = how["mask"].mT.contiguous().mT.to(device)
    with fastllm.use_backend(backend):
        found = gae(rewards, values, mask=mask)
    for ours, exact in zip(found, expected):
        assert not ours.requires_grad
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20), length=st.integers(1, 400), masked=st.sampled_from([0.0, 0.2, 0.9]),
    done=st.sampled_from([0.0, 0.02]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(rows, length, masked, done, dtype):
    rewards, values, how = some(rows, length, dtype, masked, done)
    check(rewards, values, "cpp", "cpu", by_definition, gamma=0.99, **how)


def test_dones_may_be_numbers_and_one_row_needs_no_batch():
    rewards, values, how = some(3, 9, done=0.3)
    expected = gae(rewards, values, **how)
    for number in (torch.float32, torch.int64):
        assert torch.equal(gae(rewards, values, dones=how["dones"].to(number))[0], expected[0])
    assert torch.equal(gae(rewards[1], values[1], dones=how["dones"][1])[0], expected[0][1])
    assert gae(rewards, values.double())[0].dtype == torch.float64


def test_two_runs_give_the_same_bits_whatever_the_threads():
    rewards, values, how = some(300, 400, masked=0.2)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gae(rewards, values, **how))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_agrees_with_the_loops_of_the_rlhf_libraries():
    """TRL, OpenRLHF and verl loop backwards over the columns; verl skips masked tokens as this op does, TRL and OpenRLHF
    have values and rewards of 0 at the padding."""
    rewards, values, _ = some(6, 30)
    mask = torch.arange(30) < torch.randint(1, 31, (6, 1))
    gamma, lam = 0.97, 0.92
    zeroed_r, zeroed_v = rewards * mask, values * mask
    reversed_, last = [], 0
    for t in reversed(range(30)):
        following = zeroed_v[:, t + 1] if t < 29 else 0.0
        last = zeroed_r[:, t] + gamma * following - zeroed_v[:, t] + gamma * lam * last
        reversed_.append(last)
    padded = torch.stack(reversed_[::-1], 1) * mask
    torch.testing.assert_close(gae(rewards, values, gamma=gamma, lam=lam, mask=mask)[0], padded)

    mask = torch.rand(6, 30) < 0.6
    reversed_, last, following = [], 0, 0
    for t in reversed(range(30)):
        new = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        following = values[:, t] * mask[:, t] + following * ~mask[:, t]
        last = new * mask[:, t] + last * ~mask[:, t]
        reversed_.append(last)
    skipped = torch.stack(reversed_[::-1], 1)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lam, mask=mask)
    torch.testing.assert_close(advantages, skipped * mask)
    torch.testing.assert_close(returns, (skipped + values) * mask)


def test_opcheck():
    rewards, values, how = some(3, 6, masked=0.3, done=0.2)
    rewards, values = rewards.nan_to_num(), values.nan_to_num()  # opcheck compares the inputs, too
    packed = (rewards[0], values[0], how["mask"][0], None, torch.tensor([0, 4, 6], dtype=torch.int32), 1.0, 0.9)
    for arguments in (
        (rewards, values, None, None, None, 1.0, 0.9), (rewards, values, *how.values(), None, 0.9, 0.9), packed,
    ):  # fmt: skip
        torch.library.opcheck(torch.ops.fastllm.gae.default, arguments)


def test_compiles_without_a_graph_break():
    rewards, values, how = some(4, 32, masked=0.3)
    values.requires_grad_()

    def whitened(rewards, values, mask):
        advantages, returns = gae(rewards, values, mask=mask)
        return (advantages - advantages.mean()).sum() + (values - returns)[mask].square().sum()

    compiled = torch.compile(whitened, fullgraph=True, backend="aot_eager")
    losses = [f(rewards, values, how["mask"]) for f in (compiled, whitened)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, values)[0] for loss in losses), equal_nan=True)


R = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("arguments", "how", "error", "message"),
    [
        ((R.long(), R), {}, TypeError, "rewards must be a floating-point tensor"),
        ((R, [1.0]), {}, TypeError, "values must be a tensor, got list"),
        ((R.view(2, 2, 2), R), {}, ValueError, r"rewards must have shape \(B, T\) or \(T,\), got \(2, 2, 2\)"),
        ((R, R[:, :3]), {}, ValueError, r"values must have shape \(2, 4\) .*rewards.*got \(2, 3\)"),
        ((R, R), {"mask": R}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ((R, R), {"mask": R[0].bool()}, ValueError, r"mask must have shape \(2, 4\)"),
        ((R, R), {"dones": R[:1]}, ValueError, r"dones must have shape \(2, 4\)"),
        ((R, R.to("meta")), {}, ValueError, "values and rewards must be on one device"),
        ((R, R), {"gamma": 1.5}, ValueError, "gamma .* <= 1.0, got 1.5"),
        ((R, R), {"lam": -0.1}, ValueError, "lam .*>= 0.0 and <= 1.0, got -0.1"),
        ((R, R), {"cu_seqlens": torch.tensor([0, 8])}, ValueError, r"cu_seqlens is for packed .*\(2, 4\)"),
        ((R[0], R[0]), {"cu_seqlens": torch.tensor([0, 4])}, TypeError, "cu_seqlens must be an int32 tensor"),
        ((R[0], R[0]), {"cu_seqlens": torch.tensor([0, 3, 2, 4]).int()}, ValueError, "ascend from 0 to T = 4"),
        ((R[0], R[0]), {"cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, "ascend from 0 to T = 4"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, how, error, message):
    with pytest.raises(error, match=message):
        gae(*arguments, **how)
