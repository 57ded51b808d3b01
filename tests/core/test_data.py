"""A batch is a function of (seed, step): any start, any number of workers, any number of ranks see the same batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core import data, distributed


class Numbers:
    """Sample i is i and a random draw."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def sample(self, index, rng):
        return {"index": index, "noise": rng.random(), "row": np.full(2, index, dtype=np.float32), "name": f"n{index}"}


class Ragged:
    """Epochs of different length, as a sampler of identities has them."""

    def epoch(self, number, rng):
        return [rng.integers(0, 50, 4).tolist() for _ in range(2 + number % 3)]


def take(stream, start, count):
    found = []
    for batch in stream.batches(start):
        found.append(batch)
        if len(found) == count:
            return found
    raise AssertionError("a stream never ends")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


@given(start=st.integers(0, 25), seed=st.integers(0, 2**63), ragged=st.booleans())
def test_starting_late_gives_the_same_batches(start, seed, ragged):
    plan = Ragged() if ragged else data.Shuffled(50, 8)
    straight = take(data.Stream(Numbers(50), plan, seed), 0, start + 3)[start:]
    late = take(data.Stream(Numbers(50), plan, seed), start, 3)
    assert all(map(equal, straight, late))


def test_workers_change_nothing():
    plan = data.Shuffled(40, 8)
    before = torch.get_rng_state()
    inline = take(data.Stream(Numbers(40), plan, 5), 3, 6)
    workers = take(data.Stream(Numbers(40), plan, 5, workers=2), 3, 6)
    assert all(map(equal, inline, workers))
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_are_permutations_and_differ():
    batches = take(data.Stream(Numbers(24), data.Shuffled(24, 8), 0), 0, 6)
    first, second = (torch.cat([b["index"] for b in part]).tolist() for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second


def test_noise_depends_on_place_and_not_on_index_alone():
    batches = take(data.Stream(Numbers(8), data.Shuffled(8, 8, shuffle=False), 0), 0, 2)
    assert torch.equal(batches[0]["index"], batches[1]["index"])
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])


def test_collate_keeps_kinds():
    batch = take(data.Stream(Numbers(4), data.Shuffled(4, 4, shuffle=False), 0), 0, 1)[0]
    assert batch["index"].dtype == torch.int64
    assert batch["noise"].dtype == torch.float32
    assert batch["row"].shape == (4, 2)
    assert batch["name"] == ["n0", "n1", "n2", "n3"]


def test_shards_of_the_ranks_make_the_global_batch(monkeypatch):
    whole = take(data.Stream(Numbers(24), data.Shuffled(24, 8), 3), 0, 2)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(take(data.Stream(Numbers(24), data.Shuffled(24, 8), 3), 0, 2))
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([p[number]["noise"] for p in parts]), batch["noise"])


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(ValueError, match="global batch of 8 does not divide over 3"):
        take(data.Stream(Numbers(24), data.Shuffled(24, 8), 3), 0, 1)


@pytest.mark.parametrize(("length", "batch"), [(4, 5), (4, 0)])
def test_impossible_batch_sizes_are_refused(length, batch):
    with pytest.raises(ValueError, match="batch_size must be in"):
        data.Shuffled(length, batch)


class Deadly(Numbers):
    def sample(self, index, rng):
        import os
        import signal

        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index, rng)


def test_a_killed_worker_is_a_named_error():
    stream = data.Stream(Deadly(16), data.Shuffled(16, 4, shuffle=False), 0, workers=1, timeout_s=30)
    with pytest.raises(RuntimeError, match="data loading failed"):
        take(stream, 0, 4)


class Stalled(Numbers):
    def sample(self, index, rng):
        import time

        if index == 5:
            time.sleep(60)
        return super().sample(index, rng)


def test_a_stalled_worker_is_a_named_error():
    stream = data.Stream(Stalled(8), data.Shuffled(8, 4, shuffle=False), 0, workers=1, timeout_s=1.5)
    with pytest.raises(RuntimeError, match=r"limit 1\.5 s a batch"):
        take(stream, 0, 2)


class Broken(Numbers):
    def sample(self, index, rng):
        raise ValueError(f"image {index} cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_sample_keeps_its_message(workers):
    with pytest.raises(ValueError, match="image 0 cannot be read"):
        take(data.Stream(Broken(4), data.Shuffled(4, 4, shuffle=False), 0, workers=workers), 0, 1)


def test_fingerprint_sees_names_sizes_and_on_request_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12")
    files = [tmp_path / "a", tmp_path / "b"]
    before, full = data.fingerprint(tmp_path, files), data.fingerprint(tmp_path, files, contents=True)
    (tmp_path / "a").write_bytes(b"13")
    assert data.fingerprint(tmp_path, files[::-1]) == before
    assert data.fingerprint(tmp_path, files, contents=True) != full
    (tmp_path / "a").write_bytes(b"123")
    assert data.fingerprint(tmp_path, files) != before


def test_a_last_batch_that_is_filled_is_one_batch_more_and_drops_no_sample():
    def epoch(length, batch, **options):
        plan = data.Shuffled(length, batch, **options)
        batches = plan.epoch(0, np.random.default_rng(3))
        assert len(batches) == plan.batches_per_epoch()
        assert {len(b) for b in batches} == {batch}
        return batches

    # DFormer's counts of NYUDepthv2 and SUN RGB-D: 795 and 5285 images in batches of 16, 8 and 16.
    assert [len(epoch(n, b, last_batch="fill")) for n, b in ((795, 16), (795, 8), (5285, 16))] == [50, 100, 331]
    filled = epoch(10, 4, last_batch="fill")
    assert {i for b in filled for i in b} == set(range(10))
    assert filled[:2] == epoch(10, 4)  # up to there, the order is that of `drop`
    assert epoch(8, 4, shuffle=False, last_batch="fill") == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
