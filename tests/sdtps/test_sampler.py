"""PKPlan: what a batch and an epoch must hold, for any distribution of images over identities."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.data import Stream
from plugins.sdtps.sampler import PKPlan

counts = st.lists(st.integers(1, 13), min_size=2, max_size=9)


def labels(sizes, seed=0):
    """Identity of every image: identities in shuffled order, numbers with gaps."""
    pids = [7 * i + 3 for i, size in enumerate(sizes) for _ in range(size)]
    np.random.default_rng(seed).shuffle(pids)
    return pids


@given(sizes=counts, p=st.integers(1, 4), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_every_epoch_is_a_pk_epoch(sizes, p, k, seed):
    pids = labels(sizes)
    if p > len(sizes):
        with pytest.raises(ValueError, match="at least as many"):
            PKPlan(pids, p, k)
        return
    plan = PKPlan(pids, p, k)
    epoch = plan.epoch(0, np.random.default_rng(seed))
    have = Counter(pids)
    used: Counter[int] = Counter()
    drawn: dict[int, list[int]] = {}
    for batch in epoch:
        groups = [batch[i : i + k] for i in range(0, len(batch), k)]
        assert len(groups) == p
        owners = [{pids[i] for i in group} for group in groups]
        assert all(len(owner) == 1 for owner in owners), "K images of one identity stand side by side"
        assert len(set.union(*owners)) == p, "P different identities"
        for group in groups:
            used[pids[group[0]]] += 1
            drawn.setdefault(pids[group[0]], []).extend(group)
    for pid, size in have.items():
        chunks = max(1, size // k)
        assert used[pid] <= chunks
        if size >= k:
            assert len(set(drawn.get(pid, []))) == len(drawn.get(pid, [])), "no image twice in an epoch"
    left = sum(used[pid] < max(1, size // k) for pid, size in have.items())
    assert left < p, "the epoch goes on while P identities have chunks"
    # what can be left over is at most all chunks of the P - 1 richest identities
    chunks = sorted((max(1, size // k) for size in have.values()), reverse=True)
    assert -(-(sum(chunks) - sum(chunks[: p - 1])) // p) <= len(epoch) <= plan.batches_per_epoch()


def test_identities_with_too_few_images_repeat_them():
    plan = PKPlan([1, 1, 2, 2, 2, 2, 2], identities=2, instances=4)
    seen = set()
    for seed in range(40):
        (batch,) = plan.epoch(0, np.random.default_rng(seed))
        few = batch[:4] if batch[0] < 2 else batch[4:]
        assert set(few) <= {0, 1}
        seen.add(tuple(sorted(few)))
    assert len(seen) > 2, "drawn with replacement, not always the same"


def test_length_is_exact_where_each_identity_has_one_chunk():
    plan = PKPlan([i for i in range(12) for _ in range(5)], identities=4, instances=4)
    assert plan.batches_per_epoch() == 3
    assert all(len(plan.epoch(e, np.random.default_rng(e))) == 3 for e in range(10))


def test_identities_and_images_are_chosen_alike():
    plan = PKPlan([i for i in range(6) for _ in range(4)], identities=2, instances=2)
    who, which = Counter(), Counter()
    for seed in range(1500):
        first = plan.epoch(0, np.random.default_rng(seed))[0]
        who.update({i // 4 for i in first})
        which.update(first)
    assert all(abs(who[i] / 1500 - 1 / 3) < 0.05 for i in range(6))
    assert all(abs(which[i] / 1500 - 1 / 6) < 0.05 for i in range(24))


def test_a_plan_is_a_function_of_its_generator_and_resumes_in_a_stream():
    pids = labels([5, 9, 4, 3, 8])
    a, b = PKPlan(pids, 3, 2), PKPlan(pids, 3, 2)
    assert a.epoch(0, np.random.default_rng(4)) == b.epoch(0, np.random.default_rng(4))
    assert a.epoch(0, np.random.default_rng(4)) != b.epoch(0, np.random.default_rng(5))

    class Indices:
        def __len__(self):
            return len(pids)

        def sample(self, index, rng):
            return {"index": index}

    def first(n, start):
        batches = Stream(Indices(), a, seed=1).batches(start)
        return [next(batches)["index"].tolist() for _ in range(n)]

    whole = first(20, 0)
    assert first(9, 11) == whole[11:]


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        PKPlan([1, 2], 0, 2)
    with pytest.raises(ValueError, match="at least 1"):
        PKPlan([1, 2], 1, 0)
    with pytest.raises(ValueError, match=r"lower PKPlan\.identities"):
        PKPlan([1, 1, 1, 2], 3, 2)
