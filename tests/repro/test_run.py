"""`repro run` on the main job: resumes to the bit, finds what is done, and says what is wrong with its input."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from interruption import kill_at

from core import checkpoint, record, registry


def weights(folder):
    step, state, _ = checkpoint.Store(folder / "checkpoints").newest()
    return step, state["model"]


def assert_same(a, b):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    (one, wa), (two, wb) = weights(a), weights(b)
    assert one == two
    assert all(torch.equal(v, wb[k]) for k, v in wa.items())


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_the_main_job_ends_with_its_tables_and_a_complete_folder(main_job, tmp_path):
    done = main_job("a")
    assert done.status == 0, done.err
    for text in (
        "mAP[camera]",
        "rank-10[camera]",
        "missing modalities",
        "rgb+nir  (left: tir)",
        "tokens of a modality",
        "run folder",
    ):
        assert text in done.out
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {
        "config.gin",
        "operative.gin",
        "run.json",
        "status.json",
        "metrics.jsonl",
        "timing.jsonl",
        "result.json",
        "data.json",
        "checkpoints",
        "pictures",
        "log.txt",
    } <= names
    assert any(n.startswith("events") for n in names)
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["environment"]["versions"]["torch"] == torch.__version__
    assert {"commit", "clean"} <= run["source"].keys()
    data = json.loads((tmp_path / "a" / "data.json").read_text())
    assert len(data["fingerprint"]) == 16
    assert record.status(tmp_path / "a").state == "finished"


def test_a_task_leaves_files_of_its_own_even_if_its_pictures_fail(main_job, tmp_path):
    def there():
        from plugins.sdtps.task import ReID

        def pictures(self, model, folder):
            raise OSError("no paint")

        def leave(self, model, folder):
            (folder / "left.txt").write_text(type(model).__name__)

        ReID.pictures, ReID.leave = pictures, leave

    done = main_job("a", before=there)
    assert done.status == 0, done.err
    assert "WARNING: pictures: OSError: no paint" in done.out
    assert (tmp_path / "a" / "left.txt").read_text() == "TriModalReID"
    assert not (tmp_path / "a" / "pictures").exists()


def test_a_folder_where_nothing_was_trained_is_free_for_another_config(main_job, tmp_path):
    wrong = main_job("a", settings=("sdtps.ReID.layout=@sdtps.TokenSparse",))
    assert wrong.status == 2
    assert "layout takes a component that makes Layout" in wrong.err
    assert main_job("a").status == 0
    other = main_job("a", settings=("trainer.train.seed=5",))
    assert other.status == 2
    assert "holds a run of another config" in other.err


def test_a_finished_run_is_found_and_not_repeated(main_job, tmp_path):
    main_job("a")
    before = (tmp_path / "a" / "timing.jsonl").read_text()
    again = main_job("a")
    assert again.status == 0
    assert "finished already" in again.out
    assert "mAP[camera]" in again.out
    assert (tmp_path / "a" / "timing.jsonl").read_text() == before
    fresh = main_job("a", "--fresh")
    assert fresh.status == 0
    assert (tmp_path / "a" / "timing.jsonl").read_text() != before


def test_killed_at_random_steps_it_ends_as_if_undisturbed(main_job, tmp_path):
    settings = ("STEPS=8", "trainer.train.save_every=1", "trainer.train.eval_every=4")
    main_job("straight", settings=settings)
    drawn = random.Random(5)
    for step in sorted(drawn.sample(range(1, 9), 5)):
        assert main_job("killed", settings=settings, before=kill_at(step)).status == -signal.SIGKILL
    assert main_job("killed", settings=settings).status == 0
    assert_same(tmp_path / "straight", tmp_path / "killed")
    a, b = result(tmp_path / "straight"), result(tmp_path / "killed")
    assert a == b


def test_a_signal_leaves_a_checkpoint_and_the_status_says_so(main_job, tmp_path):
    stopped = main_job("a", before=kill_at(3, signal.SIGTERM))
    assert stopped.status == record.EXIT_STOPPED == 75
    assert record.status(tmp_path / "a").state == "stopped"
    assert "the same command goes on" in stopped.out
    assert record.status(tmp_path / "a").message.endswith("the same command goes on")
    assert main_job("a").status == 0
    main_job("straight")
    assert_same(tmp_path / "straight", tmp_path / "a")


def test_operative_gin_run_again_is_the_same_run(main_job, command, tmp_path):
    main_job("a")
    again = command("run", "--gin", str(tmp_path / "a" / "operative.gin"), "--out", str(tmp_path / "b"), "--no-profile")
    assert again.status == 0, again.err
    assert_same(tmp_path / "a", tmp_path / "b")
    once_more = command("run", "--gin", str(tmp_path / "a" / "config.gin"), "--out", str(tmp_path / "c"), "--no-profile")
    assert once_more.status == 0, once_more.err
    assert_same(tmp_path / "a", tmp_path / "c")


def test_config_diff_of_two_runs(main_job, command, tmp_path):
    main_job("a", settings=("STEPS=1",))
    main_job("b", settings=("STEPS=1", "SPARSE_RATIO=0.7"))
    said = command("config", "diff", str(tmp_path / "a"), str(tmp_path / "b")).out
    assert said == "sdtps.TokenSparse.sparse_ratio\n  - 0.5\n  + 0.7\n"


def test_a_binding_without_effect_stops_before_the_first_step(main_job, tmp_path):
    done = main_job("a", settings=("optim.SGD.lr=0.1",))
    assert done.status != 0
    assert "optim.SGD.lr = 0.1 took no effect: nothing in this config builds that component" in done.err
    assert not (tmp_path / "a" / "metrics.jsonl").exists() or not (tmp_path / "a" / "metrics.jsonl").read_text()


def test_fresh_throws_away_runs_and_nothing_else(main_job, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years")
    done = main_job("a", "--fresh")
    assert done.status == 2
    assert "is not a run folder, it holds thesis.txt; --fresh clears no other" in done.err
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.txt"]


def test_runs_below_the_folder_of_a_run_are_never_cleared(main_job, tmp_path):
    assert main_job("a", settings=("sdtps.ReID.layout=@sdtps.TokenSparse",)).status == 2  # failed while it was built
    precious = tmp_path / "a" / "precious"
    precious.mkdir()
    (precious / "status.json").write_text('{"state": "finished"}')
    (tmp_path / "a" / "notes.txt").write_text("mine")
    fresh = main_job("a", "--fresh")
    assert fresh.status == 2
    assert "holds other runs, such as" in fresh.err
    assert main_job("a").status == 0  # nothing was trained here, so that another config may
    assert (precious / "status.json").is_file()
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "a" / "result.json").write_text("{")
    damaged = main_job("a")
    assert damaged.status == 2
    assert "its result.json is missing or damaged; --fresh runs it again" in damaged.err


def test_going_on_with_other_code_is_said_and_both_are_kept(main_job, tmp_path):
    gin = tmp_path / "mine.gin"
    gin.write_text("include 'gin/sdtps_rgbnt.gin'\nimport json\nimport math\n")
    asked = {"gin": str(gin), "settings": ("trainer.train.save_every=2",)}
    assert main_job("a", "--allow-import", before=kill_at(3), **asked).status == -signal.SIGKILL
    file = tmp_path / "a" / "run.json"
    began = json.loads(file.read_text())
    assert began["history"] == []
    sha = began["plugins"]["sdtps"]["sha256"]
    began["plugins"]["sdtps"]["sha256"] = began["imports"]["json"] = "another"
    began["environment"]["versions"]["torch"] = "2.0.0"
    file.write_text(json.dumps(began))
    (tmp_path / "a" / "diff.patch").write_text("an old change")
    done = main_job("a", "--allow-import", **asked)
    assert done.status == 0, done.err
    for part in (
        "import json",
        "goes on with other code than it began with",
        "torch 2.0.0 -> ",
        "plugin sdtps",
        "uncommitted changes",
    ):
        assert part in done.out
    now = json.loads(file.read_text())
    assert now["plugins"]["sdtps"]["sha256"] == sha
    assert now["imports"] == {"json": registry.source_hash(Path(json.__file__).parent), "math": registry.module_hash("math")}
    (then,) = now["history"]
    assert then["plugins"]["sdtps"]["sha256"] == "another"
    assert (tmp_path / "a" / then["diff"]).read_text() == "an old change"


def test_another_config_in_the_same_folder_is_refused(main_job):
    main_job("a")
    done = main_job("a", settings=("SEED=4",))
    assert done.status == 2
    assert "holds a run of another config" in done.err


@pytest.fixture
def broken(sample, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sample, copy)
    for manifest in copy.glob("*.json"):
        manifest.unlink()
    return copy


def test_a_missing_root_is_one_line(main_job, tmp_path):
    done = main_job("a", root=tmp_path / "nowhere")
    assert done.status != 0
    assert "nowhere" in done.err
    assert "Traceback" not in done.err
    assert record.status(tmp_path / "a").state == "failed"


def test_an_empty_root_says_what_it_should_hold(main_job, tmp_path):
    (tmp_path / "empty").mkdir()
    done = main_job("a", root=tmp_path / "empty")
    assert done.status != 0
    assert "train_171" in done.err
    assert "is empty" in done.err


def test_a_missing_modality_file_is_named(main_job, broken):
    victim = sorted((broken / "train_171" / "NI").iterdir())[3]
    victim.unlink()
    done = main_job("a", root=broken)
    assert done.status != 0
    assert victim.name in done.err
    assert "NI" in done.err


def test_an_unreadable_image_is_named(main_job, broken):
    victim = sorted((broken / "test" / "TI").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:40])
    done = main_job("a", root=broken)
    assert done.status != 0
    assert victim.name in done.err
    assert "Traceback" not in done.err


def test_queries_without_a_match_are_an_error_when_none_has_one(main_job, broken):
    for folder in ("RGB", "NI", "TI"):
        for path in (broken / "test" / folder).glob("*cam2*"):
            path.unlink()
    done = main_job("a", root=broken)
    assert done.status != 0
    assert "match" in done.err
    assert "Traceback" not in done.err


def test_a_checkpoint_of_another_model_is_refused(main_job, tmp_path):
    assert main_job("a", before=kill_at(5), settings=("trainer.train.save_every=2",)).status == -signal.SIGKILL
    assert (
        main_job("b", settings=("trainer.train.save_every=2", "sdtps.CLIPVisionTransformer.width=24"), before=kill_at(5)).status
        == -signal.SIGKILL
    )
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    shutil.copytree(tmp_path / "b" / "checkpoints", tmp_path / "a" / "checkpoints")
    done = main_job("a", settings=("trainer.train.save_every=2",))
    assert done.status != 0
    assert "is of another model" in done.err


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_falls_back_and_the_run_still_ends_the_same(main_job, tmp_path, damage):
    settings = ("trainer.train.save_every=2",)
    main_job("straight", settings=settings)
    main_job("a", settings=settings, before=kill_at(6))
    newest = checkpoint.Store(tmp_path / "a" / "checkpoints").path(4)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 16
    newest.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    done = main_job("a", settings=settings)
    assert done.status == 0, done.err
    assert "WARNING" in done.out
    assert "going on from step 2" in done.out
    assert_same(tmp_path / "straight", tmp_path / "a")


def test_a_full_disk_while_saving_keeps_what_was_saved(main_job, tmp_path):
    def full():
        original, count = checkpoint._write_all, []

        def write(handle, data):
            count.append(1)
            if len(count) == 2:
                raise OSError(28, "No space left on device")
            original(handle, data)

        checkpoint._write_all = write

    settings = ("trainer.train.save_every=2",)
    done = main_job("a", settings=settings, before=full)
    assert done.status != 0
    assert "disk full" in done.err
    assert "bytes needed" in done.err
    assert weights(tmp_path / "a")[0] == 2
    assert main_job("a", settings=settings).status == 0
    main_job("straight", settings=settings)
    assert_same(tmp_path / "straight", tmp_path / "a")


def test_scalars_are_mirrored_to_weights_and_biases_where_asked(main_job, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    done = main_job("a", "--wandb", "sdtps", settings=("STEPS=2",))
    assert done.status == 0, done.err
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*/run-a.wandb"))


VARIANTS = sorted(p.stem for p in __import__("pathlib").Path(__file__).parents[2].glob("gin/sdtps/variants/*.gin"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_notes_trains(main_job, tmp_path, variant):
    done = main_job("a", gin=f"gin/sdtps/variants/{variant}.gin", settings=("STEPS=2",))
    assert done.status == 0, done.err
    assert 0 <= result(tmp_path / "a")["metrics"]["mAP[camera]"] <= 1


def test_a_run_whose_output_nobody_reads_any_more_goes_on(main_job, unread, tmp_path):
    for _ in ("trained", "shown again"):
        done = main_job("a", settings=("STEPS=2",), before=unread)
        assert (done.status, done.err) == (0, "")
        assert record.status(tmp_path / "a").state == "finished"
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "run folder" in log
    assert "step 2/2  evaluation: " in log
    assert "finished already" in main_job("a", settings=("STEPS=2",)).out
