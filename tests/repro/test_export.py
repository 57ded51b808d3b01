"""`repro export` through the command line, at a size that takes seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch

from core import export as exporting

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
    done = command("export", "--run", str(run), "--only", "image", "--format", "torch")
    assert done.status == 0, done.err
    from core import trainer

    trained = trainer.initial_weights(str(run))
    saved = torch.export.load(run / "export/image.pt2").state_dict
    assert torch.equal(saved["neck.weight"], trained["neck.weight"])


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
        (("--gin", "gin/sdtps_rgbnt.gin", "--tolerance", "0"), "error: --tolerance must be positive"),
        (("--run", "docs"), "error: docs is no run folder"),
        (("--run", "docs", "--set", "A=1"), "error: --set and --weights go with --gin"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(command, words, said):
    done = command("export", *words)
    assert done.status == 2
    assert done.err.startswith(said), done.err
