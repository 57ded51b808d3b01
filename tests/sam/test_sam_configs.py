"""Every gin file of SAM that can be run builds its task and model with no binding left over, alone and composed as documented."""

import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import building
import pytest

from core import config as configs

ROOT = Path(__file__).parents[2]
VARIANTS = ["gin/sam_nyu.gin", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "gin/sam/variants").glob("*.gin"))]
PRESETS = sorted(p.stem for p in (ROOT / "gin/sam/presets").glob("*.gin"))
FORK = sorted(p.stem for p in (ROOT / "gin/sam/fork").glob("*.gin"))
TEXTLESS = ("no_text", "control")

wheel = pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="the wheel wordllama (extra: text) is not installed"
)


@pytest.fixture(scope="module")
def root(sample, tmp_path_factory):
    """A copy: vectors of the tags are cached below the data set."""
    return shutil.copytree(sample, tmp_path_factory.mktemp("configs") / "NYU")


def build(file, root, folder, monkeypatch, **settings):
    monkeypatch.chdir(ROOT)
    settings = {"ROOT": str(root), "DEVICE": "cpu", **settings}
    config = configs.read(str(file), [f"{k}={v}" for k, v in settings.items()])
    return building.build(config, folder)


def composed(folder, *files):
    (folder / "mine.gin").write_text("".join(f"include '{file}'\n" for file in files))
    return folder / "mine.gin"


@pytest.mark.parametrize("file", [f if Path(f).stem in TEXTLESS else pytest.param(f, marks=wheel) for f in VARIANTS])
def test_a_recipe_builds_and_leaves_no_binding_over(file, root, tmp_path, monkeypatch):
    found = build(file, root, tmp_path / "run", monkeypatch)
    assert found["unused"] == []
    assert (found["task"].guidance is None) == (Path(file).stem == "no_text")


@wheel
@pytest.mark.parametrize(("preset", "release"), itertools.product(PRESETS, (False, True)))
def test_every_preset_goes_after_a_recipe_with_or_without_the_release_s_switches(preset, release, root, tmp_path, monkeypatch):
    files = ["gin/sam_nyu.gin", f"gin/sam/presets/{preset}.gin", *(["gin/sam/release.gin"] if release else [])]
    assert build(composed(tmp_path, *files), root, tmp_path / "run", monkeypatch)["unused"] == []


@pytest.mark.parametrize("base", ["sample", "fork/nyu_s"])
def test_text_guidance_is_switched_off_by_one_include_in_the_place_of_the_text(base, root, tmp_path, monkeypatch):
    file = composed(tmp_path, f"gin/sam/{base}.gin", "gin/sam/no_text.gin")
    found = build(
        file, root, tmp_path / "run", monkeypatch, **({} if base == "sample" else {"PRETRAINED": None, "WORKERS": 0, "BATCH": 2})
    )
    assert found["unused"] == []
    assert found["task"].guidance is None
    assert not [name for name, _ in found["model"].named_parameters() if "alignment" in name]


@pytest.mark.parametrize("name", FORK)
def test_the_fork_s_recipe_without_text_is_the_one_with_text_but_for_the_text(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = ["ROOT=/data", "PRETRAINED=/weights"]
    plain = configs.read(str(composed(tmp_path, f"gin/sam/fork/{name}.gin", "gin/sam/no_text.gin")), files).effective()
    guided = configs.read(
        f"gin/sam/{name}.gin", [*files, *(f"{k}=/{k}" for k in ("TAGS", "CLIP_WEIGHTS", "CLIP_VOCABULARY"))]
    ).effective()
    differ = {key for key in plain.keys() | guided.keys() if plain.get(key) != guided.get(key)}
    text = ("sam.ImageTags.", "text.CLIPText.", "sam.SemanticAlignment.", "sam.Segmentor.", "sam.Segmentation.text")
    assert {key for key in differ if not key.startswith(text)} <= {"sam.Segmentation.published"}
    assert plain["sam.Segmentation.text"] == "None"


@wheel
@pytest.mark.parametrize(
    ("source", "files"), [("class_names", ["class_names"]), ("captions", ["captions"]), ("both", ["class_names", "captions"])]
)
def test_every_source_of_text_is_one_include_and_goes_with_the_release_s_switches(source, files, root, tmp_path, monkeypatch):
    image = (Path(root) / "train.txt").read_text().split()[0]
    (Path(root) / "captions.json").write_text(json.dumps([{"rgb_path": image, "description": "A bed. A lamp."}]))
    base = composed(
        tmp_path,
        "gin/sam/sample.gin",
        f"gin/sam/texts/{source}.gin",
        "gin/sam/release.gin",
        *(f"gin/sam/release/{file}.gin" for file in files),
    )
    base.write_text(base.read_text() + "ENCODER = @text.WordLlamaText\n")
    found = build(base, root, tmp_path / "run", monkeypatch)
    assert found["unused"] == []
    assert found["task"].guidance.count == {"class_names": 40, "captions": 10, "both": 50}[source]


@pytest.mark.parametrize("name", ["nyu_s", "sun_s"])
def test_full_recipes_take_every_source_and_count_steps_as_the_release(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    needed = [f"{k}=/{k}" for k in ("ROOT", "PRETRAINED", "CLIP_WEIGHTS", "CLIP_VOCABULARY")]
    for source in ("class_names", "captions", "both"):
        file = composed(
            tmp_path, f"gin/sam/fork/{name}.gin", f"gin/sam/texts/{source}.gin", "gin/sam/clip.gin", "gin/sam/release/sun.gin"
        )
        bound = configs.read(str(file), needed).effective()
        assert bound["sam.SemanticAlignment.top_m"] == "5"
        assert bound["sam.Segmentation.last_batch"] == "'fill'"
        assert not [key for key in bound if key.startswith("sam.ImageTags.")]
    plain = configs.read(
        str(composed(tmp_path, f"gin/sam/dformer/{name}.gin", "gin/sam/release/plain.gin")), needed[:2]
    ).effective()
    assert plain["sam.Segmentation.optimise_raw_params"] == "False"
