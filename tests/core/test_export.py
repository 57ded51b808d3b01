import pytest
import torch
from torch import nn

from core import export
from core.export import ExportError, Part


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x, gate):
        y = self.drop(self.linear(x)) * gate[:, None, None]
        return y, y.sum(dim=1)


def part(module=None, name="mix", **replaced):
    inputs = {"x": torch.randn(2, 4, 3), "gate": torch.tensor([0.5, 2.0])}
    given = {"outputs": ("y", "total"), "dynamic": {"x": {0: "batch", 1: "tokens"}, "gate": {0: "batch"}}, **replaced}
    return Part(name, module or Mix(), inputs, **given)


def test_inputs_are_cut_and_repeated_along_named_axes():
    made = part().at({"batch": 3, "tokens": 2})
    assert made["x"].shape == (3, 2, 3)
    assert torch.equal(made["gate"], torch.tensor([0.5, 2.0, 0.5]))
    assert part().sizes() == {"batch": 2, "tokens": 4}


def test_both_formats_give_the_modules_numbers_at_other_sizes(tmp_path):
    pytest.importorskip("onnxruntime")
    module = Mix().train()
    seen = []
    done = export.export([part(module)], tmp_path, told=seen.append)
    assert [e.format for e in done] == ["torch", "onnx"]
    assert seen == done
    assert all(e.worst < 1e-6 and e.path.stat().st_size == e.bytes > 0 for e in done)
    assert {"batch": 1, "tokens": 1} in done[0].sizes
    assert module.training
    for e in done:
        given = export.load(e.path, ("y", "total"))({"x": torch.ones(7, 5, 3), "gate": torch.ones(7)})
        assert given["y"].shape == (7, 5, 2)
        expected = module.linear(torch.ones(3))
        assert torch.allclose(given["y"][6, 4], expected, atol=1e-6)


def test_a_difference_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    class Wrong(Mix):
        def forward(self, x, gate):
            y, total = super().forward(x, gate)
            return (y, total) if torch.compiler.is_compiling() else (y + 0.1, total)

    with pytest.raises(ExportError, match="mix: torch differs from PyTorch by"):
        export.export([part(Wrong())], tmp_path, ("torch",))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_is_named(tmp_path):
    class Branch(Mix):
        def forward(self, x, gate):
            return super().forward(x, gate) if x.sum() > 0 else (x, x)

    with pytest.raises(ExportError, match=r"branch: torch\.export cannot trace it"):
        export.export([part(Branch(), "branch")], tmp_path)


def test_wrong_names_and_formats_are_errors(tmp_path):
    with pytest.raises(ValueError, match="different names"):
        export.export([part(), part()], tmp_path)
    with pytest.raises(ValueError, match="formats must be among torch, onnx"):
        export.export([part()], tmp_path, ("tflite",))
    with pytest.raises(ExportError, match="end in"):
        export.load(tmp_path / "mix.bin", ("y",))


def test_onnx_without_its_packages_says_which_extra(tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def missing(name, *rest):
        if name == "onnx":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(export.importlib, "import_module", missing)
    with pytest.raises(ExportError, match=r"needs onnx; install the extra: pip install 'ginrepro\[export\]'"):
        export.export([part()], tmp_path, ("onnx",))
