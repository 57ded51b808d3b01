"""Plugins from outside: everything arrives through the entry point, from a wheel too, and what is broken is one line."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from core import config, registry
from repro import report

pytest_plugins = ["installed"]
CHECKOUT = Path(__file__).parents[2]

# One of everything that a plugin can bring.
WINDOWS = '''
"""Windowed sums through an operator of its own, with what it costs."""

from pathlib import Path

import torch
from core import data
from core.profile import formula
from core.registry import register
from core.task import DataCard, StepResult, Task
from torch import nn


@torch.library.custom_op("outside::mix", mutates_args=())
def mix(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@mix.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[-1])


mix.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1].T, ctx.saved_tensors[0].T @ grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@formula("outside::mix")
def cost(call):
    return 1000 * call["x"][0] * call["weight"][0] * call["weight"][1]


@register("module", paper="Outside, eq. 7")
class Mixer(nn.Module):
    """A matrix."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, x):
        return mix(x, self.weight)


@register("dataset_maker", paper="generated")
def outside_sample(root: str, *, seed: int = 0, count: int = 2) -> None:
    """Numbers in files."""
    Path(root).mkdir(parents=True)
    for i in range(count):
        (Path(root) / f"{i}.txt").write_text(str(seed + i))


@register("dataset_checker", paper="generated")
def outside_sample_files(root: str) -> list:
    """Whether they are there."""
    found = len(list(Path(root).glob("*.txt")))
    return [data.Finding("ok" if found == 3 else "error", "files", str(found), "3")]


@register("task", paper="Outside, table 1")
class Fit(Task):
    """Learns a matrix."""

    def __init__(self, *, mixer: type = Mixer, width: int = 3):
        self.mixer, self.width = mixer, width

    def prepare(self, workspace):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(8, self.width, generator=generator)
        return DataCard("numbers", "-", "0", True, {"rows": 8})

    def model(self):
        return self.mixer(width=self.width)

    def batches(self, start, seed):
        while True:
            yield {"x": self.x}

    def losses(self, model, batch, step):
        return StepResult({"square": model(batch["x"]).square().mean()})

    def evaluate(self, model):
        return {"error": float(model(self.x).square().mean())}

    def profile_inputs(self, batch=1):
        return (torch.ones(batch, self.width),)
'''
GOLDEN = """
from core.golden import Replay, adapter


@adapter("OutsideDouble")
def double(case):
    return Replay(None, lambda inputs: {"y": 2 * inputs["x"]})
"""
CLAIMS = """
from core.claims import claim, holds, published


@claim("OUT-1", "two is even", source="table 0")
def even():
    return holds(2 % 2 == 0, measured="remainder 0")


published("error", "the published error", plugin="outside", source="table 1", config="outside:fit.gin", metric="error", value=0.5, tolerance=0.1)
"""
FIT = """
include 'gin/base/train.gin'
include 'size.gin'
TASK = @outside.Fit
STEPS = 2
outside.Fit.mixer = @outside.Mixer
"""


@pytest.fixture
def outside(install):
    install(
        "outside",
        {
            "windows.py": WINDOWS,
            "golden.py": GOLDEN,
            "claims.py": CLAIMS,
            "gin/fit.gin": FIT,
            "gin/size.gin": "outside.Fit.width = 5\n",
        },
    )
    return install


def test_everything_of_a_plugin_arrives_through_its_entry_point(outside, tmp_path):
    done = outside.repro("run", "--gin", "outside:fit.gin", "--out", tmp_path / "run")
    assert done.status == 0, done.err
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())["model"]
    assert profile["macs"] == 1000 * 1 * 5 * 5  # its own formula, and the width of its included file
    made = outside.repro("data", "make", "outside-sample", "--root", tmp_path / "made", "--set", "count=3")
    assert made.status == 0, made.err
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["0.txt", "1.txt", "2.txt"]
    checked = outside.repro("data", "check", "outside-sample-files", "--root", tmp_path / "made")
    assert checked.status == 0
    assert "files: 3" in checked.out


def test_its_golden_adapters_and_claims_are_found(outside, tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "cases").mkdir()
    x = torch.arange(3.0)
    for name, y in (("right", 2 * x), ("wrong", 3 * x)):
        save_file(
            {"in/x": x, "out/y": y}, tmp_path / "cases" / f"{name}.safetensors", {"meta": json.dumps({"module": "OutsideDouble"})}
        )
    (tmp_path / "cases" / "cut.safetensors").write_bytes(b"nonsense")
    done = outside.repro("verify", "outside", "--golden", tmp_path / "cases", "--json", tmp_path / "v.json")
    assert done.status == 1
    assert "1 of 3 golden cases agree" in done.out
    found = json.loads((tmp_path / "v.json").read_text())
    passed = {r["case"]: r["passed"] for r in found["golden"]}
    assert passed == {"cut.safetensors": False, "right.safetensors": True, "wrong.safetensors": False}
    assert "not a readable safetensors file" in found["golden"][0]["error"]
    assert "1 of 3 golden cases agree" in outside.repro("claims", tmp_path / "v.json", "--plugin", "outside").out
    assert report.claimed(found).paragraphs[-1] == "1 of 3 golden cases agree."
    assert [(r["plugin"], r["id"], r["verdict"]) for r in found["claims"]] == [("outside", "OUT-1", "holds")]


def test_list_says_kind_paper_distribution_version_file_and_on_request_time_and_hash(outside, tmp_path):
    plain = outside.repro("list", "--plugin", "outside")
    assert plain.status == 0
    (line,) = [row for row in plain.out.splitlines() if row.startswith("outside.Mixer ")]
    assert re.fullmatch(r"outside\.Mixer +module +outside-dist 3\.4 +outside/windows\.py:\d+ +Outside, eq\. 7", line)
    assert "import" not in plain.out
    imported = outside.repro("list", "--plugin", "outside", "--imports")
    assert re.search(r"plugin outside +outside-dist 3\.4 .*import \d+\.\d\d s  sha256 [0-9a-f]{12}", imported.out)
    data = json.loads(outside.repro("list", "--plugin", "outside", "--json").out)
    assert {(c["name"], c["version"]) for c in data["components"]} >= {("outside.Fit", "3.4"), ("outside.outside_sample", "3.4")}


def test_a_misspelt_gin_file_of_a_plugin_names_the_nearest(outside):
    done = outside.repro("config", "outside:fitt.gin")
    assert done.status == 2
    assert "nearest: outside:fit.gin" in done.err


BROKEN_PARTS = {
    "raising": ("import nothing_of_that_name\n", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "exiting": ("raise SystemExit(4)\n", "exited with 4"),
    "wordy": ("raise RuntimeError('one\\ntwo\\nthree')\n", "RuntimeError: one two three"),
    "unparsed": ("def (:\n", "SyntaxError"),
}


def test_broken_claims_or_golden_modules_are_one_line_each_and_the_others_go_on(outside, tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, (text, _) in BROKEN_PARTS.items():
        outside(name, {"thing.py": "X = 1\n", "claims.py": text, "golden.py": text})
    (tmp_path / "cases").mkdir()
    x = torch.arange(3.0)
    save_file(
        {"in/x": x, "out/y": 2 * x}, tmp_path / "cases" / "case.safetensors", {"meta": json.dumps({"module": "OutsideDouble"})}
    )
    golden = outside.repro("verify", "--golden", tmp_path / "cases")
    assert golden.status == 0, golden.out + golden.err
    assert "1 of 1 golden cases agree" in golden.out
    claims = outside.repro("verify", *BROKEN_PARTS, "outside")
    assert claims.status == 1
    assert "OUT-1  [HOLDS]" in claims.out
    for done in (golden, claims):
        assert "Traceback" not in done.err
        for name, (_, cause) in BROKEN_PARTS.items():
            (line,) = [row for row in done.err.splitlines() if name in row]
            assert cause in line
            assert f"{name}-dist" in line


def test_makers_of_one_name_in_two_plugins_are_called_in_full(install, tmp_path):
    maker = """
        from pathlib import Path
        from core.registry import register

        @register("dataset_maker")
        def rgbnt_sample(root: Path | str) -> Path:
            "Somebody else's."
            Path(root).mkdir()
            (Path(root) / "theirs").write_text("made")
            return Path(root)
    """
    install("elsewhere", {"made.py": maker})
    listed = install.repro("data", "list").out
    assert {"elsewhere.rgbnt-sample", "sdtps.rgbnt-sample"} <= set(listed.split())
    assert " rgbnt-sample " not in listed
    unclear = install.repro("data", "make", "rgbnt-sample", "--root", tmp_path / "a")
    assert unclear.status == 2
    assert "nearest: " in unclear.err
    assert "sdtps.rgbnt-sample" in unclear.err
    assert install.repro("data", "make", "elsewhere.rgbnt-sample", "--root", tmp_path / "a").status == 0
    assert (tmp_path / "a" / "theirs").is_file()
    assert install.repro("data", "make", "sap.pacs-sample", "--root", tmp_path / "b", "--set", "per_cell=zero").status == 2


def test_a_golden_module_that_hangs_is_cut_off(install, monkeypatch, tmp_path):
    install("sleeper", {"golden.py": "import time\ntime.sleep(60)\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.plugins.cache_clear()
    try:
        with pytest.raises(registry.PluginError, match=r"sleeper-dist.*sleeper\.golden: its import took longer than 0\.3 s"):
            registry.load_part("sleeper", "golden", limit_s=0.3)
    finally:
        registry.plugins.cache_clear()


def test_what_ran_can_be_run_again_where_other_plugins_have_the_same_names(outside, tmp_path):
    """operative.gin names everything in full, so a plugin installed later makes nothing in it ambiguous."""
    ran = outside.repro("run", "--gin", "outside:fit.gin", "--out", tmp_path / "run", "--no-profile")
    assert ran.status == 0, ran.err
    outside("elsewhere", {"windows.py": WINDOWS.replace("outside", "elsewhere")})
    again = outside.repro("run", "--gin", tmp_path / "run" / "operative.gin", "--out", tmp_path / "again", "--no-profile")
    assert again.status == 0, again.err
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "again" / "operative.gin").read_text() == (tmp_path / "run" / "operative.gin").read_text()
    assert "\noutside.Fit.width = 5\n" in (tmp_path / "run" / "operative.gin").read_text()


# --- from a wheel -----------------------------------------------------------------------------------------------------


def test_the_wheel_carries_every_config_and_finds_them(fresh, tmp_path):
    ours = {p.relative_to(CHECKOUT / "gin"): p.read_bytes() for p in (CHECKOUT / "gin").rglob("*.gin")}
    packed = fresh.packages / "repro" / "configs"
    assert {p.relative_to(packed): p.read_bytes() for p in packed.rglob("*.gin")} == ours
    assert (fresh.packages / "gin" / "config.py").is_file()  # the library, which is not the config folder
    where = fresh.python(
        "-c",
        "from core import config, registry; print(config.config_root()); print(registry.plugins()['sdtps'].folder)",
        cwd=tmp_path,
    )
    assert where.stdout.split() == [str(packed), str(fresh.packages / "plugins" / "sdtps")], where.stderr
    required = ("--set", "ROOT=/data", "--set", "WEIGHTS=/weights")
    for name, extra in (("gin/sdtps_rgbnt.gin", ()), ("sdtps:rgbnt201.gin", required), ("sdtps:variants/baseline.gin", ())):
        done = fresh.repro("config", name, *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == config.read(name, extra[1::2]).text()
    missing = fresh.repro(
        "run", "--gin", "sdtps:rgbnt201.gin", "--set", f"ROOT={tmp_path / 'nowhere'}", "--set", "WEIGHTS=/weights", cwd=tmp_path
    )
    assert missing.returncode != 0
    assert "nowhere" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_the_main_job_runs_from_the_wheel(fresh, sample, tmp_path):
    small = ("width=16", "layers=1", "heads=2")
    given = [f"ROOT={sample}", "STEPS=2", "trainer.train.threads=1", "trainer.train.eval_first=False", "sdtps.PKPlan.identities=3"]
    given += ["sdtps.PKPlan.instances=2", *(f"sdtps.CLIPVisionTransformer.{s}" for s in small)]
    settings = [w for s in given for w in ("--set", s)]
    # The environment lies in a repository of the user's, which is not where the code comes from.
    for words in (("init", "-q"), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs")):
        subprocess.run(["git", "-C", str(fresh.folder.parent), *words], check=True)
    done = fresh.repro("run", "--gin", "gin/sdtps_rgbnt.gin", *settings, "--out", tmp_path / "run", "--no-profile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["step"] == 2
    assert 0 <= result["metrics"]["mAP[camera]"] <= 1
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["source"] == {"commit": None, "clean": None}
    assert info["environment"]["versions"]["ginrepro"] == "0.1.0"
    assert all(f.startswith(str(fresh.packages / "repro" / "configs")) for f in info["files"])


def test_what_an_installed_file_includes_is_installed_too(tmp_path, monkeypatch):
    """A folder that happens to hold a file of the same name does not take the place of an installed one."""
    (tmp_path / "gin" / "base").mkdir(parents=True)
    (tmp_path / "gin" / "base" / "train.gin").write_text("this is not gin\n")
    monkeypatch.chdir(tmp_path)
    assert config.locate("gin/base/train.gin") == tmp_path / "gin" / "base" / "train.gin"
    root = config.config_root()
    assert config.locate("gin/base/train.gin", root / "sdtps") == root / "base" / "train.gin"
    assert config.locate("gin/base/train.gin", tmp_path / "gin") == tmp_path / "gin" / "base" / "train.gin"
    assert config.read(str(CHECKOUT / "gin" / "sdtps_rgbnt.gin")).get("trainer.train.seed") == 0
