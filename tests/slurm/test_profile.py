"""Cluster profiles: files of keys, checked."""

import pytest

from slurm import profile


def test_every_profile_that_comes_with_the_project_is_whole():
    assert set(profile.names()) >= {"cpu", "one_gpu", "eight_gpus", "two_nodes", "local"}
    for name in profile.names():
        assert profile.read(name).minutes >= 1


def test_changes_come_on_top_of_a_file(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text("PARTITION = 'gpu'\nTIME = '1-02:00:00'\nGPUS = 4\nEXTRA = {'gres': 'shard:4'}\n")
    found = profile.read(str(path), ["gpus=2", "qos=long", "setup=['module load cuda']"])
    assert (found.partition, found.minutes, found.gpus, found.qos) == ("gpu", 26 * 60, 2, "long")
    assert found.setup == ["module load cuda"]
    assert found.extra == {"gres": "shard:4"}


@pytest.mark.parametrize(
    ("time", "minutes"), [("60", 60), ("0:30:00", 30), ("00:00:30", 1), ("2-01:00", 49 * 60), ("24:00:00", 1440)]
)
def test_times_are_whole_minutes(time, minutes):
    assert profile.read(None, [f"time={time}", "signal_s=5"]).minutes == minutes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["tim=60"], "nearest: TIME"),
        (["time=soon"], "TIME must be minutes"),
        (["time=10:00"], "write hours too"),
        (["time=0"], "at least a minute"),
        (["cpus=1.5"], "CPUS must be int"),
        (["cpus=0"], "CPUS must be at least 1"),
        (["nodes=[1"], "NODES must be int"),
        (["time=1", "signal_s=60"], "must be less than TIME"),
        (["time"], "want KEY=VALUE"),
        (["setup=module"], "SETUP must be list"),
    ],
)
def test_a_wrong_key_or_value_is_said(changes, said):
    with pytest.raises(ValueError, match=said):
        profile.read(None, changes)


def test_a_profile_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match="one_gpu"):
        profile.read("one_gpus")


def test_a_file_is_checked_as_a_whole(tmp_path):
    path = tmp_path / "bad.gin"
    path.write_text("TIME = 60\nTIME = 61\nNODE = 1\na.B.c = 3\nimport os\nGPUS = @optim.AdamW\n")
    with pytest.raises(ValueError) as caught:
        profile.read(str(path))
    assert [line.partition(": ")[0].rpartition(":")[2] for line in str(caught.value).splitlines()] == ["2", "3", "4", "5", "6"]
