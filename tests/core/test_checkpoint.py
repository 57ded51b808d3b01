"""A checkpoint is whole or it is not there, and a damaged one is never used in silence."""

import errno
import os
import signal

import children
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from core import checkpoint


def state(scale=1.0):
    torch.manual_seed(3)
    return {
        "model": {
            "weight": torch.randn(5, 3) * scale,
            "scalar": torch.tensor(2.5),
            "none": torch.zeros(0, 4),
            "mask": torch.tensor([True, False]),
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 7: {"step": torch.tensor(4.0)}},
            "groups": [{"betas": (0.9, 0.999), "lr": 1e-3}],
        },
        "random": checkpoint.random_state(),
        "name": "é",
        "missing": None,
        "infinite": float("inf"),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_nested_state_comes_back_exactly(tmp_path):
    before = state()
    checkpoint.save(tmp_path / "c.safetensors", before)
    assert same(before, checkpoint.load(tmp_path / "c.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_tied_weights_and_views_are_stored(tmp_path):
    shared = torch.randn(4, 4)
    checkpoint.save(tmp_path / "c.safetensors", {"a": shared, "b": shared, "c": shared.t(), "d": shared[:2]})
    back = checkpoint.load(tmp_path / "c.safetensors")
    assert torch.equal(back["b"], shared)
    assert torch.equal(back["c"], shared.t())


def test_random_states_continue(tmp_path):
    import random

    import numpy as np

    checkpoint.save(tmp_path / "c.safetensors", {"random": checkpoint.random_state()})
    expected = (torch.rand(3), np.random.rand(3), random.random())
    checkpoint.restore_random_state(checkpoint.load(tmp_path / "c.safetensors")["random"])
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(expected[0], again[0])
    assert (expected[1] == again[1]).all()
    assert expected[2] == again[2]


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, where, bit):
    path = tmp_path_factory.mktemp("flip") / "c.safetensors"
    checkpoint.save(path, state())
    data = bytearray(path.read_bytes())
    position = int(where * len(data))
    data[position] ^= 1 << bit
    path.write_bytes(data)
    try:
        back = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017  # a flip may also fall on a byte without meaning
    else:  # the flip fell on a byte without meaning, such as padding of the header
        assert same(back, state())


@given(part=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_found(tmp_path_factory, part):
    path = tmp_path_factory.mktemp("cut") / "c.safetensors"
    checkpoint.save(path, state())
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(checkpoint.CheckpointError, match=r"c\.safetensors"):
        checkpoint.load(path)


def test_the_newest_whole_one_is_used_and_the_damage_is_told(tmp_path):
    store = checkpoint.Store(tmp_path)
    store.save(1, state(1.0))
    store.save(2, state(2.0))
    data = bytearray(store.path(2).read_bytes())
    data[-5] ^= 4
    store.path(2).write_bytes(data)
    step, found, complaints = store.newest()
    assert step == 1
    assert same(found["model"], state(1.0)["model"])
    assert len(complaints) == 1
    assert "step-000000002" in complaints[0]


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    store = checkpoint.Store(tmp_path)
    store.save(1, state())
    store.path(1).write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="no usable checkpoint"):
        store.newest()
    assert checkpoint.Store(tmp_path / "empty").newest() is None


def test_old_ones_go_and_the_best_stays(tmp_path):
    store = checkpoint.Store(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, {"step": step}, best=2 if step >= 2 else None)
    assert store.steps() == [2, 4, 5]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_failed_write_names_the_path_and_leaves_the_rest(tmp_path, monkeypatch, number):
    store = checkpoint.Store(tmp_path)
    store.save(1, state())
    written = []

    def fail(handle, data):
        handle.write(data[: len(data) // 2])
        written.append(len(data))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "_write_all", fail)
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot write .*step-000000002.* bytes needed, .* free") as caught:
        store.save(2, state())
    assert f"{written[0]:,}" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.safetensors"]
    assert store.newest()[0] == 1


def test_killed_at_any_byte_of_the_write_leaves_the_last_complete_one(tmp_path):
    """SIGKILL inside the write, at twenty places, and between the write and the rename: the earlier file is used."""
    store = checkpoint.Store(tmp_path)
    store.save(1, state(1.0))
    for part in [i / 19 for i in range(20)] + ["rename"]:

        def killed(part=part):
            def write(handle, data):
                handle.write(data if part == "rename" else data[: int(part * (len(data) - 1))])
                os.kill(os.getpid(), signal.SIGKILL)

            checkpoint._write_all = write
            checkpoint.Store(tmp_path).save(2, state(2.0))

        assert children.run(killed) == -signal.SIGKILL
        step, found, complaints = store.newest()
        assert (step, complaints) == (1, [])
        assert same(found["model"], state(1.0)["model"])
    assert list(tmp_path.glob(".*.tmp"))
    store.save(2, state(2.0))
    assert not list(tmp_path.glob(".*.tmp"))


def test_names_that_look_alike_stay_apart(tmp_path):
    one, two = torch.ones(1), torch.full((1,), 2.0)
    for state in ({"a/b": one, "a": {"b": two}}, {"x": {1: one, "1": two}}, {"a": {"b": one, "b'": two}, "a/b": two}):
        checkpoint.save(tmp_path / "s.safetensors", state)
        torch.testing.assert_close(checkpoint.load(tmp_path / "s.safetensors"), state, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"x: a tuple \(\(1, 2\)\) cannot be a key in a checkpoint"):
        checkpoint.save(tmp_path / "t.safetensors", {"x": {(1, 2): one}})
    assert not (tmp_path / "t.safetensors").exists()


def test_an_object_that_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match="model/layer: a object"):
        checkpoint.save(tmp_path / "c.safetensors", {"model": {"layer": object()}})
    assert not list(tmp_path.iterdir())


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_reading_weights_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(checkpoint.CheckpointError, match="without running code"):
        checkpoint.read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
    weights = {"a": torch.ones(2), "model": torch.zeros(1)}
    for held in (
        {"state_dict": weights},
        {"model": {"state_dict": weights}},
        {"state_dict": {"model": weights}, "epoch": 3},
        weights,
    ):
        torch.save(held, tmp_path / "good.pt")
        read = checkpoint.read_weights(tmp_path / "good.pt")
        assert read.keys() == weights.keys()
        assert torch.equal(read["a"], torch.ones(2))


def test_strict_loading_reports_every_kind_of_misfit():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = {**before, "0.weight": torch.zeros(9, 9), "extra": torch.zeros(1), "1.total_ops": torch.zeros(1)}
    del wrong["1.bias"]
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load_model(model, wrong, what="file.pt", ignore=("total_ops",))
    for part in ("file.pt", "missing: 1.bias", "unexpected: extra", "0.weight (file (9, 9), model (3, 2))", "ignored: 1.total_ops"):
        assert part in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = checkpoint.load_model(model, {k: v + 1 for k, v in before.items()}, what="file.pt")
    assert report.complete
    assert report.matched == 4
