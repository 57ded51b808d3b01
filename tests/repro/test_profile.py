"""`repro profile` from the command line: what it counts, and over which inputs."""

import json

import pytest
import tiny_job

GIN = "gin/sdtps_rgbnt.gin"


def words(sample):
    return [word for binding in (*tiny_job.OVERRIDES, f"ROOT={sample}") for word in ("--set", binding)]


def test_test_samples_of_the_data_are_counted_one_by_one(command, sample, tmp_path):
    done = command("profile", "--gin", GIN, *words(sample), "--repeats", "1", "--inputs", "3", "--json", "p.json", folder=tmp_path)
    assert done.status == 0, done.err
    assert "(all 3)" in done.out
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["inputs"]["macs"] == [found["model"]["macs"]] * 3  # nothing here depends on what is seen
    (stages,) = found["inputs"]["tokens"].values()
    assert {name: set(counts) for name, counts in stages.items()} == {
        "patches": {128}, "kept": {64}, "aggregated": {25}, "with extra": {26},
    }  # fmt: skip
    assert found["compression"]["over_inputs"] == found["inputs"]


def test_a_task_in_a_scope_is_counted_in_it(command, tmp_path):
    network, tower = "sdtps.TriModalReID", "sdtps.CLIPVisionTransformer"
    scoped = (
        "TASK=@deep/sdtps.ReID", f"deep/sdtps.ReID.network=@deep/{network}", f"deep/{network}.backbone=@deep/{tower}", f"deep/{tower}.layers=7",
    )  # fmt: skip
    found = []
    for name, settings in (("scoped", scoped), ("plain", (f"{tower}.layers=7",))):
        words = [w for s in settings for w in ("--set", s)]
        done = command("profile", "--gin", GIN, "--count", *words, "--json", f"{name}.json", folder=tmp_path)
        assert done.status == 0, done.err
        found.append(json.loads((tmp_path / f"{name}.json").read_text())["model"]["macs"])
    assert found[0] == found[1]


def test_more_samples_than_there_are_count_all_of_them(command, sample, tmp_path):
    done = command("profile", "--gin", GIN, *words(sample), "--repeats", "1", "--inputs", "500", folder=tmp_path)
    assert done.status == 0, done.err
    assert f"(all {len(list((sample / 'test' / 'RGB').iterdir()))})" in done.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--inputs", "3", "--count"], "not with --count"),
        (["--inputs", "-1"], "at least 1"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_counted_is_one_clear_error(command, argv, said, tmp_path):
    done = command("profile", "--gin", GIN, *argv, folder=tmp_path)
    assert done.status == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_a_task_that_names_no_inputs_says_so(command, tmp_path):

    def without():
        from plugins.sdtps.task import ReID

        def nothing(self, batch=1):
            return super(ReID, self).profile_inputs(batch)

        ReID.profile_inputs = nothing

    done = command("profile", "--gin", GIN, "--count", before=without, folder=tmp_path)
    assert done.status == 2
    assert done.err == "error: ReID has no profile_inputs, so there is nothing to count\n"
