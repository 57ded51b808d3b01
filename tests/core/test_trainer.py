"""The loop: resumes to the bit, stops before a bad update, honours signals at step boundaries."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import children
import pytest
import torch
from toy import Toy, train

from core import checkpoint, optim, record, schedules, trainer
from core.task import StepResult


def weights(path):
    step, state, _ = checkpoint.Store(Path(path) / "checkpoints").newest()
    return step, state["model"]


def assert_same_run(a, b):
    assert (Path(a) / "metrics.jsonl").read_bytes() == (Path(b) / "metrics.jsonl").read_bytes()
    (step_a, wa), (step_b, wb) = weights(a), weights(b)
    assert step_a == step_b
    assert wa.keys() == wb.keys()
    assert all(torch.equal(wa[k], wb[k]) for k in wa)


def killed_at(path, step, task=Toy, **options):
    """Train in a child process that gets SIGKILL in the middle of a step."""

    class Dies(task):
        def losses(self, model, batch, now):
            if now == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().losses(model, batch, now)

    assert children.run(lambda: train(path, Dies, **options) and 0) == -signal.SIGKILL


def test_the_loop_learns(tmp_path):
    outcome = train(tmp_path / "a", steps=120, eval_first=True, optimizer=lambda g: optim.AdamW(g, lr=0.02))
    assert outcome.last["accuracy"] > outcome.first["accuracy"] + 0.3
    assert outcome.last["accuracy"] > 0.85


@pytest.mark.parametrize(
    ("options", "kills"),
    [({}, 10), ({"save_every": 1}, 4), ({"save_every": 7, "eval_every": 5, "accumulate": 2, "clip_norm": 0.1}, 4)],
)
def test_killed_at_random_steps_and_resumed_is_undisturbed(tmp_path, options, kills):
    train(tmp_path / "straight", **options)
    drawn = random.Random(str(options))
    for step in sorted(drawn.randint(1, 30) for _ in range(kills)):
        saved = checkpoint.Store(tmp_path / "killed" / "checkpoints").steps()
        if not saved or saved[-1] < step:
            killed_at(tmp_path / "killed", step, **options)
    train(tmp_path / "killed", **options)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert record.status(tmp_path / "killed").attempts > 1


def test_one_config_and_seed_is_one_result_and_another_seed_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, seed=seed)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() != (tmp_path / "c" / "metrics.jsonl").read_bytes()


def test_how_often_one_evaluates_changes_no_weight(tmp_path):
    train(tmp_path / "seldom")
    train(tmp_path / "often", eval_every=1, eval_first=True)
    assert all(torch.equal(v, weights(tmp_path / "often")[1][k]) for k, v in weights(tmp_path / "seldom")[1].items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("when", [0, 7])
def test_a_signal_stops_at_the_step_boundary_with_a_checkpoint(tmp_path, number, when):
    class Signalled(Toy):
        def losses(self, model, batch, step):
            if step == when:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGTERM)  # a second one while the first waits
            return super().losses(model, batch, step)

        def evaluate(self, model):
            if when == 0:
                os.kill(os.getpid(), number)
            return super().evaluate(model)

    with pytest.raises(trainer.Stopped) as caught:
        train(tmp_path / "stopped", Signalled, eval_first=True)
    assert caught.value.step == when
    assert weights(tmp_path / "stopped")[0] == when
    train(tmp_path / "stopped", eval_first=True)
    train(tmp_path / "straight", eval_first=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_signal_while_the_data_are_prepared_is_kept_for_the_first_step(tmp_path):
    class Slow(Toy):
        def prepare(self, workspace):
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().prepare(workspace)

    with pytest.raises(trainer.Stopped) as caught:
        train(tmp_path / "stopped", Slow, eval_first=True)
    assert (caught.value.step, caught.value.signum) == (0, signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    train(tmp_path / "stopped", eval_first=True)
    train(tmp_path / "straight", eval_first=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_signal_before_training_is_not_forgotten(tmp_path):
    with record.Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(trainer.Stopped) as caught:
            train(tmp_path / "stopped")
    assert caught.value.step == 0


@pytest.mark.parametrize("failing", [10, 30])
def test_an_evaluation_that_fails_loses_nothing_of_the_training(tmp_path, failing):
    steps = []

    class Unreadable(Toy):
        def losses(self, model, batch, step):
            steps.append(step)
            return super().losses(model, batch, step)

        def evaluate(self, model):
            if steps and steps[-1] == failing:
                raise ValueError("test/7.jpg is unreadable as an image")
            return super().evaluate(model)

    with pytest.raises(ValueError, match="unreadable"):
        train(tmp_path / "failed", Unreadable, eval_first=True, eval_every=10)
    assert weights(tmp_path / "failed")[0] == failing
    steps.clear()

    class Mended(Toy):
        def losses(self, model, batch, step):
            steps.append(step)
            return super().losses(model, batch, step)

    mended = train(tmp_path / "failed", Mended, eval_first=True, eval_every=10)
    assert steps == list(range(failing + 1, 31))
    assert mended == train(tmp_path / "straight", eval_first=True, eval_every=10)
    assert_same_run(tmp_path / "straight", tmp_path / "failed")


@pytest.mark.parametrize("eval_first", [True, False])
def test_a_metric_to_select_by_that_nothing_gives_is_said_before_the_first_step(tmp_path, eval_first):
    with pytest.raises(ValueError, match=r"train\.select is 'mAP', which the evaluation does not give; it gives accuracy"):
        train(tmp_path / "a", eval_first=eval_first, select="mAP")
    assert not checkpoint.Store(tmp_path / "a" / "checkpoints").steps()
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == ""


def test_looking_for_the_selected_metric_changes_no_number(tmp_path):
    train(tmp_path / "a", steps=6)
    train(tmp_path / "b", steps=6, select="accuracy")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_other_data_than_the_checkpoint_was_trained_on_are_refused(tmp_path):
    class Other(Toy):
        def prepare(self, workspace):
            return dataclasses.replace(super().prepare(workspace), fingerprint="another")

    train(tmp_path / "a")
    before = (tmp_path / "a" / "data.json").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"trained on data with fingerprint .*, now it is another"):
        train(tmp_path / "a", Other)
    assert (tmp_path / "a" / "data.json").read_bytes() == before


class BadLoss(Toy):
    def losses(self, model, batch, step):
        result = super().losses(model, batch, step)
        bad = result.losses["size"] * float("nan") if step == 5 else result.losses["size"]
        return StepResult({"ce": result.losses["ce"], "size": bad})


class BadGradient(Toy):
    def losses(self, model, batch, step):
        result = super().losses(model, batch, step)
        if step == 5:  # sqrt at 0: a finite loss with an infinite slope
            result.losses["ce"] = result.losses["ce"] + (model[0].weight * 0).sqrt().sum()
        return result


class BadConstant(Toy):
    def losses(self, model, batch, step):
        result = super().losses(model, batch, step)
        return StepResult({**result.losses, "constant": torch.tensor(float("inf") if step == 5 else 0.0)})


@pytest.mark.parametrize(
    ("task", "said"), [(BadLoss, "loss term size"), (BadGradient, "gradient of 0.weight"), (BadConstant, "loss term constant")]
)
def test_a_non_finite_step_stops_before_the_update_and_names_the_part(tmp_path, task, said):
    with pytest.raises(trainer.NonFinite, match=said) as caught:
        train(tmp_path / "a", task, save_every=1)
    assert "step 5" in str(caught.value)
    assert caught.value.step == 5
    with pytest.raises(trainer.NonFinite):
        train(tmp_path / "c", task, log_every=20)
    assert [row["step"] for row in record.read_lines(tmp_path / "c" / "metrics.jsonl")] == [1, 2, 3, 4]  # the curve that led there
    train(tmp_path / "b", steps=4, save_every=1, schedule=schedules.Constant)
    step, kept = weights(tmp_path / "a")
    assert step == 4
    assert all(torch.equal(v, weights(tmp_path / "b")[1][k]) for k, v in kept.items())
    assert record.status(tmp_path / "a").state == "failed"
    assert "NonFinite" in record.status(tmp_path / "a").message


def test_the_device_side_guard_freezes_the_weights_at_the_last_good_step(tmp_path, monkeypatch):
    """The path of accelerators (no wait per step), run on the CPU: found at the next log, weights those before the bad step."""
    seen = {}
    original = trainer._Guard.__init__

    def patient(self, optimizer, device):
        original(self, optimizer, device)
        self.waits = False

    raised = trainer._Guard._raise

    def note(self, step, losses, model):
        seen["weights"] = {k: v.clone() for k, v in model.state_dict().items()}
        raised(self, step, losses, model)

    monkeypatch.setattr(trainer._Guard, "__init__", patient)
    monkeypatch.setattr(trainer._Guard, "_raise", note)
    with pytest.raises(trainer.NonFinite, match="step 5: loss term size"):
        train(tmp_path / "a", BadLoss, log_every=10)
    train(tmp_path / "b", steps=4)
    assert all(torch.equal(v, seen["weights"][k]) for k, v in weights(tmp_path / "b")[1].items())


def test_accumulation_equals_the_large_batch(tmp_path):
    class Even(Toy):
        dropout = 0.0
        noise = 0.0

        def losses(self, model, batch, step):
            return StepResult({"ce": torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])})

    class Small(Even):
        batch = 8

    train(tmp_path / "large", Even, steps=6, optimizer=lambda g: optim.SGD(g, lr=0.1))
    train(tmp_path / "small", Small, steps=6, accumulate=2, optimizer=lambda g: optim.SGD(g, lr=0.1))
    large, small = weights(tmp_path / "large")[1], weights(tmp_path / "small")[1]
    assert all(torch.allclose(v, small[k], atol=1e-6) for k, v in large.items())


def test_clipping_limits_each_group(tmp_path):
    class Two(Toy):
        def clip_groups(self, model):
            return {"first": model[0].parameters(), "last": model[4].parameters()}

    limit, seen = 1e-3, []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(
                [
                    float(torch.stack([p.grad.norm() for p in g]).norm())
                    for g in (self.param_groups[0]["params"][:2], self.param_groups[0]["params"][2:])
                ]
            )
            return super().step(closure)

    train(tmp_path / "a", Two, steps=3, clip_norm=limit, optimizer=lambda g: Watch(g, lr=0.1))
    assert all(abs(norm - limit) < limit * 1e-2 for pair in seen for norm in pair)


def test_best_and_last_are_both_kept(tmp_path):
    class Falling(Toy):
        def evaluate(self, model):
            self.count = getattr(self, "count", 0) + 1
            return {"score": [0.0, 0.2, 0.9, 0.5, 0.1][self.count - 1]}  # the first looks whether there is such a metric

    outcome = train(tmp_path / "a", Falling, steps=20, eval_every=5, keep=1, select="score")
    assert (outcome.best_step, outcome.best["score"], outcome.last["score"]) == (10, 0.9, 0.1)
    assert checkpoint.Store(tmp_path / "a" / "checkpoints").steps() == [10, 20]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": None}, "exactly one of train.steps and train.epochs"),
        ({"epochs": 3}, "exactly one of"),
        ({"accumulate": 0}, "train.accumulate must be at least 1"),
        ({"accumulate": 2, "steps": None, "epochs": 3}, "an epoch is counted in batches and a step takes 2; give train.steps"),
        ({"threads": 0}, "train.threads must be from 1 to 4096"),
        ({"threads": 100_000_000}, "train.threads must be from 1 to 4096"),
        ({"seed": -1}, "train.seed must be from 0"),
        ({"seed": 10**23}, "train.seed must be from 0"),
        ({"device": "meta"}, "train.device must be 'auto', 'cpu' or 'cuda', with :N for one of several, got 'meta'"),
        ({"device": "mps"}, "train.device must be 'auto', 'cpu' or 'cuda'"),
        ({"device": "gpu"}, "train.device must be 'auto', 'cpu' or 'cuda', with :N for one of several, got 'gpu'"),
        ({"clip_norm": -1.0}, "clip_norm must be positive"),
        ({"precision": "fp16"}, "needs a CUDA device"),
        ({"device": "cuda"}, "torch sees no CUDA device"),
        ({"select": "mAP"}, "it gives accuracy"),
    ],
)
def test_settings_that_cannot_work_say_so(tmp_path, options, said):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ValueError, match=said):
        train(tmp_path / "a", **options)


def test_half_precision_stops_at_a_bad_loss_though_its_scaler_skips_the_update(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_check_precision", lambda precision, place: None)  # the scaler works on the CPU too, only slower
    with pytest.raises(trainer.NonFinite, match="step 5: loss term size"):
        train(tmp_path / "a", BadLoss, precision="fp16", optimizer=lambda g: optim.AdamW(g))
    overflowing = train(tmp_path / "b", BadGradient, precision="fp16", optimizer=lambda g: optim.AdamW(g))
    assert overflowing.step == 30  # that step is skipped, and the scale is halved


def test_epochs_count_the_tasks_steps(tmp_path):
    assert train(tmp_path / "a", steps=None, epochs=4).step == 12


def test_bf16_trains(tmp_path):
    assert train(tmp_path / "a", precision="bf16").step == 30


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path / "a")

    class Wider(Toy):
        def model(self):
            return torch.nn.Linear(8, 3)

    with pytest.raises(checkpoint.CheckpointError, match=r"of another model.*0\.weight"):
        train(tmp_path / "a", Wider)
    with pytest.raises(checkpoint.CheckpointError, match="seed 0, this one has 4"):
        train(tmp_path / "a", seed=4)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path):
    train(tmp_path / "straight", save_every=5, steps=30)
    killed_at(tmp_path / "b", 12, save_every=5)
    newest = checkpoint.Store(tmp_path / "b" / "checkpoints").path(10)
    data = bytearray(newest.read_bytes())
    data[-7] ^= 1
    newest.write_bytes(data)
    train(tmp_path / "b", save_every=5)
    assert_same_run(tmp_path / "straight", tmp_path / "b")
    assert "damaged" in (tmp_path / "b" / "log.txt").read_text()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original, count = checkpoint._write_all, []

    def full(handle, data):
        count.append(1)
        if len(count) > 2:
            raise OSError(28, "No space left on device")
        original(handle, data)

    monkeypatch.setattr(checkpoint, "_write_all", full)
    with pytest.raises(checkpoint.CheckpointError, match="disk full"):
        train(tmp_path / "a", save_every=5)
    monkeypatch.undo()
    assert weights(tmp_path / "a")[0] == 10
    train(tmp_path / "a", save_every=5)
    train(tmp_path / "straight", save_every=5)
    assert_same_run(tmp_path / "straight", tmp_path / "a")


def test_a_full_disk_under_the_log_is_named_and_does_not_hide_what_ended_the_run(tmp_path):
    def write(name, then):
        with record.RunFolder(tmp_path / name, chatty=False) as run:
            run.open_metrics(0)
            run._metrics = open("/dev/full", "w")  # noqa: SIM115
            run.metrics([{"step": 1}])
            then(run)

    def fail(run):
        raise KeyError("the reason")

    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left on device; free space"):
        write("a", lambda run: run.flush())
    with pytest.raises(KeyError, match="the reason"):
        write("b", fail)


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    with record.RunFolder(tmp_path / "a", chatty=False):
        code = f"from core import record; from pathlib import Path; record.RunFolder(Path({str(tmp_path / 'a')!r})).__enter__()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"in use by pid {os.getpid()} on " in done.stderr
    assert "since 2" in done.stderr


def test_initial_weights_come_from_another_run(tmp_path):
    train(tmp_path / "a")

    class Still(Toy):
        pass

    train(tmp_path / "b", Still, steps=1, initial=str(tmp_path / "a"), optimizer=lambda g: optim.SGD(g, lr=0.0))
    assert all(torch.equal(v, weights(tmp_path / "b")[1][k]) for k, v in weights(tmp_path / "a")[1].items())
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        train(tmp_path / "c", initial=str(tmp_path / "nowhere.pt"))


def test_every_step_is_logged_once_with_every_term(tmp_path):
    train(tmp_path / "a", eval_every=10)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 31))
    assert [r["step"] for r in rows if "eval" in r] == [10, 20, 30]
    assert {"loss", "loss/ce", "loss/size", "accuracy", "grad_norm", "lr"} <= rows[0].keys()


def test_the_step_reads_nothing_back_from_the_device(tmp_path, monkeypatch):
    """Between logs no scalar is read: the number of `.item()`-like reads does not grow with the number of steps."""
    original = trainer._Guard.__init__

    def patient(self, optimizer, device):
        original(self, optimizer, device)
        self.waits = False

    monkeypatch.setattr(trainer._Guard, "__init__", patient)
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, real=real, **k: (reads.append(1), real(self, *a, **k))[1])

    def count(steps):
        reads.clear()
        train(tmp_path / f"n{steps}", steps=steps, log_every=1000, save_every=0)
        return len(reads)

    count(4)
    assert count(24) == count(8)


@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="torch.compile needs a C compiler")
def test_a_compiled_model_trains_to_the_same_losses(tmp_path):
    class Plain(Toy):
        dropout = 0.0

    train(tmp_path / "compiled", Plain, steps=4, compile=True)
    train(tmp_path / "eager", Plain, steps=4)
    losses = [
        [json.loads(line).get("loss", 0.0) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("compiled", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
