"""Trees of candidates against decoding one token after the other."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

import fastllm
from fastllm.errors import ConfigError
from fastllm.streaming import StreamingCache, tree_mask, verify_tree
from tests.patching.models import llama, tokens
from tests.streaming.test_cache import TIGHT, family, fed

# 63 candidates as Medusa chooses them: the likelier a path, the deeper its children go.
PATHS = [path for depth in range(1, 5) for path in itertools.product(range(8), repeat=depth)]
WIDE = sorted(PATHS, key=lambda path: (sum(path) + len(path), path))[:63]


def test_a_tree_of_four_nodes_by_hand():
    mask, positions = tree_mask([(0,), (1,), (0, 0)])
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert positions.tolist() == [0, 1, 1, 2]


def test_a_tree_of_sixty_three_candidates_in_any_order():
    assert len(WIDE) == 63
    for choices in (WIDE, WIDE[::-1]):
        mask, positions = tree_mask(choices)
        paths = [(), *choices]
        for i, j in itertools.product(range(64), repeat=2):
            assert mask[i, j] == (paths[i][: len(paths[j])] == paths[j])
        assert positions.tolist() == [len(p) for p in paths]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ([()], "0 or more"),
        ([(0,), (0,)], "twice"),
        ([(0, 1)], "no parent"),
        ([(-1,)], "0 or more"),
        ([0, 1], "0 or more"),
        ([(0.5,)], "0 or more"),
        ("ab", "0 or more"),
    ],
)
def test_what_is_no_tree_is_said(choices, said):
    with pytest.raises(ConfigError, match=said):
        tree_mask(choices)


def drafted(model, cache, root, choices, right):
    """Candidates of which those along the path `right` are what the model says."""
    paths, ids = [(), *map(tuple, choices)], {(): int(root)}
    generator = torch.Generator().manual_seed(int(root))
    cache = copy.deepcopy(cache)
    said = fed(model, torch.tensor([[int(root)]]), cache, 1)[0, -1]
    likely = {}
    for n in range(1, len(right) + 1):
        likely[tuple(right[:n])] = token = int(said.argmax())
        said = fed(model, torch.tensor([[token]]), cache, 1)[0, -1]
    for path in paths[1:]:
        ids[path] = likely.get(path, int(torch.randint(3, 97, (), generator=generator)))
    return torch.tensor([ids[path] for path in paths])


CACHES = {
    "dense": lambda model: DynamicCache(),
    "not yet full": lambda model: StreamingCache(model, 3, 60),
    "evicting": lambda model: StreamingCache(model, 3, 9),
    "becoming full": lambda model: StreamingCache(model, 3, 22),
    "no sinks": lambda model: StreamingCache(model, 0, 9),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "patched"])
def test_it_is_sequential_decoding(kind, implementation):
    model, ids = llama().eval(), tokens(1, 24)
    if implementation == "patched":
        fastllm.patch(model)
    else:
        model.set_attn_implementation(implementation)
    choices = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 1)]
    cache = CACHES[kind](model)
    fed(model, ids[:, :-1], cache, 23)
    root = int(ids[0, -1])
    for right in ((0, 1, 1), (), (1,), (0, 0), (0, 1, 0)):
        candidates = drafted(model, cache, root, choices, right)
        sequential = copy.deepcopy(cache)
        before = cache.get_seq_length()
        found = verify_tree(model, candidates, choices, cache)
        paths = [(), *choices]
        for node, path in enumerate(paths):
            row = [paths.index(path[:n]) for n in range(len(path) + 1)]
            each = fed(model, candidates[row].unsqueeze(0), copy.deepcopy(sequential), 1)[0, -1]
            torch.testing.assert_close(found.logits[node], each, **TIGHT)
        assert found.path == [paths.index(right[:n]) for n in range(len(right) + 1)]
        assert found.tokens.tolist() == candidates[found.path[1:]].tolist()
        assert cache.get_seq_length() == before + 1 + len(right)
        accepted = torch.tensor([[root, *found.tokens.tolist()]])
        last = fed(model, accepted, sequential, 1)[0, -1]
        assert found.next_token == int(last.argmax())
        more = tokens(1, 3)
        torch.testing.assert_close(
            fed(model, more, copy.deepcopy(cache), 1), fed(model, more, copy.deepcopy(sequential), 1), **TIGHT
        )
        root = found.next_token


def test_a_mixed_model():
    model, ids = family("gemma3_text"), tokens(1, 24)
    choices = [(0,), (1,), (0, 0)]
    cache = StreamingCache(model, 3, 9)
    fed(model, ids[:, :-1], cache, 23)
    sequential = copy.deepcopy(cache)
    candidates = drafted(model, cache, ids[0, -1], choices, (0, 0))
    found = verify_tree(model, candidates, choices, cache)
    assert found.path == [0, 1, 3]
    fed(model, candidates[[0, 1, 3]].unsqueeze(0), sequential, 1)
    more = tokens(1, 12)
    torch.testing.assert_close(fed(model, more, cache, 1), fed(model, more, sequential, 1), **TIGHT)


def test_what_is_wrong_is_said_and_leaves_the_cache_usable():
    model, ids = llama().eval(), tokens(1, 20)
    cache, other = StreamingCache(model, 3, 9), StreamingCache(model, 3, 9)
    fed(model, ids, cache, 20), fed(model, ids, other, 20)
    with pytest.raises(ConfigError, match="3 ids"):
        verify_tree(model, torch.tensor([5, 6]), [(0,), (1,)], cache)
    with pytest.raises(ConfigError, match="verify_tree needs"):
        verify_tree(model, torch.tensor([5, 6]), [(0,)], DynamicCache(config=family("gemma3_text").config))
    with pytest.raises(ConfigError, match="no tree"):
        cache.accept([0])
    two = StreamingCache(model, 3, 9)
    fed(model, ids.expand(2, -1), two, 20)
    with pytest.raises(ConfigError, match="2 rows"):
        verify_tree(model, torch.tensor([5, 6]), [(0,)], two)
    more = tokens(1, 3)
    torch.testing.assert_close(fed(model, more, cache, 1), fed(model, more, other, 1), **TIGHT)
