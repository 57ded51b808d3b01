"""`repro export` through the command line, at a size that takes seconds."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from core import checkpoint, trainer
from core import config as configs
from core import export as exporting
from core.task import Task
from plugins.sam.rgbd_sample import rgbd_sample
from repro import export as verb

# Two decoder layers: ONNX's optimiser has broken what it joins between layers.
TINY = (
    "DIM=16", "HEADS=2", "HIDDEN=16", "ENCODER_LAYERS=1", "DECODER_LAYERS=2", "QUERIES=3", "TRUNK_WIDTH=4", "TRUNK_CHANNELS=8", "text.HashedText.dim=8",
)  # fmt: skip
SET = [word for binding in TINY for word in ("--set", binding)]


def parts_of(folder):
    return json.loads((folder / "export.json").read_text())["files"]


def test_a_config_exports_encoder_decoder_and_scorer_and_onnx_runtime_agrees(command, tmp_path):
    pytest.importorskip("onnxruntime")
    words = (
        "--only",
        "encoder",
        "decoder",
        "scorer",
        "--format",
        "onnx",
        "--sizes",
        "batch=1,tokens=1",
        "--sizes",
        "batch=3,tokens=7",
    )
    done = command("export", "--gin", "gin/sam3_fusion.gin", *SET, "--out", str(tmp_path / "out"), *words)
    assert done.status == 0, done.err
    files = parts_of(tmp_path / "out")
    assert [f["file"] for f in files] == ["encoder.onnx", "decoder.onnx", "scorer.onnx"]
    assert all(f["worst"] < 1e-5 and f["dynamic"] == "batch, tokens" for f in files)
    assert "batch=3,tokens=7" in done.out.replace(" ", "")
    run = exporting.load(tmp_path / "out/encoder.onnx", ("memory",))
    features, prompt = torch.randn(4, 16, 8, 8), torch.randn(4, 2, 16)
    assert run({"features": features, "prompt": prompt, "pad": torch.zeros(4, 2, dtype=torch.bool)})["memory"].shape == (4, 64, 16)


def test_a_run_folder_exports_its_trained_weights(command, tmp_path):
    run, settings = tmp_path / "runs/one", ("STEPS=2", "trainer.train.eval_first=False", "trainer.train.threads=1")
    sample = ("sam3_fusion.shapes_sample.train=12", "sam3_fusion.shapes_sample.test=2")
    words = [w for s in (*settings, *sample) for w in ("--set", s)]
    done = command("run", "--gin", "gin/sam3_fusion.gin", *SET, *words, "--out", str(run), "--no-profile")
    assert done.status == 0, done.err
    done = command("export", "--run", str(run), "--only", "image", "prompt", "--format", "torch", "--sizes", "tokens=3")
    assert done.status == 0, done.err
    assert [f["tried"] for f in parts_of(run / "export")] == ["batch=2; batch=1; batch=5", "tokens=3"]
    trained = trainer.initial_weights(str(run))
    saved = torch.export.load(run / "export/image.pt2").state_dict
    assert torch.equal(saved["neck.weight"], trained["neck.weight"])


SAM = (
    "sam.DFormer.dims=(8, 16, 16, 32)", "sam.DFormer.depths=(1, 1, 1, 1)", "sam.DFormer.heads=(2, 2, 2, 4)", "sam.HamburgerHead.dim=16",
    "sam.HamburgerHead.ham_dim=16", "sam.HamburgerHead.rank=4", "sam.TrainTransform.crop=(32, 48)", "sam.Segmentation.profile_size=(32, 48)",
    "ENCODER=@text.HashedText", "text.HashedText.dim=12", "sam.ImageTags.max_tags=4", "sam.Segmentation.profile_text=(6, 12)", "BATCH=4",
    "STEPS=2", "trainer.train.eval_first=False",
)  # fmt: skip


def test_a_run_is_built_as_it_ran_and_without_its_data_at_the_sizes_of_its_config(command, tmp_path, capsys):
    data, run = tmp_path / "NYU", tmp_path / "runs/one"
    rgbd_sample(str(data), train=6, test=2, height=32, width=48)
    words = [w for s in (*SAM, f"ROOT={data}") for w in ("--set", s)]
    done = command("run", "--gin", "gin/sam_nyu.gin", *words, "--out", str(run), "--no-profile", "--quiet")
    assert done.status == 0, done.err
    trained, asked = trainer.initial_weights(str(run)), argparse.Namespace(allow_import=False)

    def built(tokens):
        model, folder, said = verb._trained(run, asked)
        assert folder == run / "export"
        assert model.example_tokens == tokens
        assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
        return said

    assert built(tokens=4) == f"{run} (best checkpoint)"
    assert capsys.readouterr().out == ""
    data.rename(tmp_path / "elsewhere")
    assert built(tokens=6) == f"{run} (best checkpoint), built without its data"
    assert f"the run cannot be set up again: NYUDepthv2 at {data}: no such folder" in capsys.readouterr().out
    text = (run / "config.gin").read_text()
    (run / "config.gin").write_text(text.replace("profile_text = (6, 12)", "profile_text = (6, 16)"))
    with pytest.raises(checkpoint.CheckpointError, match=rf"\(file \(16, 12\), model \(16, 16\)\).* what the run had: .*{data}"):
        verb._trained(run, asked)


def test_a_task_that_builds_nothing_without_its_data_is_one_clear_error(tmp_path):
    class Needy(Task):
        def prepare(self, workspace):
            raise ValueError("no folder 'x'")

        def model(self):
            return torch.nn.Linear(self.classes, 1)

    with pytest.raises(
        ValueError, match=r"again \(no folder 'x'\), and Needy builds no model without that \(AttributeError: .*'classes'"
    ):
        verb._rebuilt(Needy(), tmp_path / "run", 0)


@pytest.mark.parametrize(
    ("gin", "settings", "model"),
    [
        ("gin/sdtps_rgbnt.gin", ("sdtps.CLIPVisionTransformer.width=16", "sdtps.CLIPVisionTransformer.heads=2"), "TriModalReID"),
        ("gin/sap_pacs.gin", (), "DualStreamModel"),
    ],
)
def test_a_run_of_a_model_without_parts_says_so(command, tmp_path, gin, settings, model):
    config = configs.read(gin, [*settings, f"ROOT={tmp_path / 'gone'}"])
    (tmp_path / "config.gin").write_text(config.text())
    done = command("export", "--run", str(tmp_path))
    assert done.status == 2
    assert done.err == f"error: {model} names no parts to export (it has no method export_parts)\n"


def test_without_onnx_there_is_one_clear_error(command, tmp_path):
    def without():
        sys.modules["onnx"] = None

    words = ("--only", "scorer", "--format", "onnx")
    done = command("export", "--gin", "gin/sam3_fusion.gin", *SET, "--out", str(tmp_path), *words, before=without)
    assert done.status == 1
    assert done.err.strip().splitlines() == ["error: ONNX export needs onnx; install the extra: pip install 'ginrepro[export]'"]
    assert not list(Path(tmp_path).glob("*.onnx"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--gin", "gin/sam3_fusion.gin", *SET, "--only", "mask"),
            "error: --only mask: the model has the parts image, prompt, encoder",
        ),
        (("--gin", "gin/sam3_fusion.gin", "--sizes", "batch=0"), "error: --sizes wants NAME=N"),
        (
            ("--gin", "gin/sam3_fusion.gin", "--sizes", "batch=1,tokens=2,batch=3"),
            "error: --sizes batch=1,tokens=2,batch=3: batch is given",
        ),
        (
            ("--gin", "gin/sam3_fusion.gin", *SET, "--only", "encoder", "--sizes", "tokens=3,bathc=2"),
            "error: --sizes bathc: no part to export has an axis of this name; nearest: batch (encoder: batch, tokens)",
        ),
        (("--gin", "gin/sdtps_rgbnt.gin", "--tolerance", "0"), "error: --tolerance must be positive"),
        (("--run", "docs"), "error: docs is no run folder"),
        (("--run", "docs", "--set", "A=1"), "error: --set and --weights go with --gin"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(command, words, said):
    done = command("export", *words)
    assert done.status == 2
    assert done.err.startswith(said), done.err
