"""Gin with restraint: everything gin 0.5.0 lets pass in silence is one clear error."""

import inspect
import subprocess
import sys

import pytest

from core import config as configs
from core import registry


@pytest.fixture
def gin_file(tmp_path):
    def write(text, name="a.gin"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


GOOD = """
STEPS = 10
trainer.train.steps = %STEPS
trainer.train.optimizer = @optim.AdamW
optim.AdamW.lr = 0.001
"""


def problems(file, *overrides, **options):
    with pytest.raises(configs.ConfigError) as caught:
        configs.read(file, overrides, **options)
    return caught.value.problems


def test_good_file_gives_effective_bindings(gin_file):
    config = configs.read(gin_file(GOOD))
    assert config.effective() == {
        "trainer.train.steps": "10",
        "trainer.train.optimizer": "@optim.AdamW",
        "optim.AdamW.lr": "0.001",
    }


def test_short_names_mean_the_same_run(gin_file):
    full = configs.read(gin_file(GOOD))
    short = configs.read(
        gin_file(GOOD.replace("trainer.train.", "train.").replace("%STEPS", "10").replace("STEPS = 10\n", ""), "b.gin")
    )
    assert full.signature == short.signature


def test_canonical_text_reads_back_to_the_same_run(gin_file):
    config = configs.read(gin_file(GOOD))
    again = configs.read(gin_file(config.text(), "again.gin"))
    assert again.signature == config.signature
    assert again.text() == config.text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trainer.train.stepz = 3", "nearest: steps"),
        ("trainer.trian.steps = 3", "trainer.train"),
        ("trainer.train.seed = 'oops'", "must be int, got 'oops'"),
        ("trainer.train.seed = True", "must be int"),
        ("trainer.train.clip_norm = 'x'", "must be float | None"),
        ("trainer.train.precision = 'fp8'", "Literal"),
        ("trainer.train.schedule = 3", "Callable"),
        ("trainer.train.schedule = @schedules.Constant()", "pass the constructor, @schedules.Constant"),
        ("trainer.train.schedule = @schedules.Konstant", "schedules.Constant"),
        ("trainer.train.seed = %SED", "no macro %SED"),
        ("UNUSED = 3", "never used"),
        ("trainer.train.run = None", "supplied by the program"),
        ("trainer.train.seed = 1\ntrainer.train.seed = 2", "bound twice"),
        ("trainer.train.seed = 1\ntrain.seed = 2", "bound twice"),
        ("trainer.train.seed = %gin.REQUIRED", "required and not set"),
        ("import os", "would execute it"),
        ("include '/etc/hostname'", "leaves the config folders"),
        ("include 'nothing.gin'", "no gin file"),
        ("trainer.train.seed = = 3", "a.gin"),
        ("trainer.train.seed = {[1]: 2}", "cannot be read: unhashable type"),
        ("trainer.train.clip_norm = 1e400", "inf is no value"),
        ("A = %B\nB = %A\ntrainer.train.seed = %A", "macro A leads back to itself: A -> B -> A"),
        ("A = [%A]\ntrainer.train.seed = %A", "macro A leads back to itself: A -> A"),
    ],
)
def test_each_mistake_is_one_clear_error(gin_file, line, said):
    found = problems(gin_file(GOOD + line + "\n"))
    assert len(found) == 1, found
    assert said in found[0]
    assert "a.gin" in found[0]


def test_all_mistakes_are_reported_at_once(gin_file):
    found = problems(gin_file(GOOD + "trainer.train.stepz = 3\nNEVER = 1\ntrainer.train.seed = 'x'\n"))
    assert len(found) == 3


def test_mistakes_carry_their_line(gin_file):
    (found,) = problems(gin_file("trainer.train.steps = 3\n\ntrainer.train.seed = 'x'\n"))
    assert "a.gin:3:" in found


def test_include_is_shadowed_by_the_file_and_the_file_by_set(gin_file):
    gin_file("trainer.train.steps = 1\ntrainer.train.seed = 1\n", "base.gin")
    main = gin_file("include 'base.gin'\ntrainer.train.steps = 2\n")
    config = configs.read(main, ["train.steps=3"])
    assert config.get("trainer.train.steps") == 3
    assert config.get("trainer.train.seed") == 1
    said = "\n".join(configs.why(config, "train.steps"))
    assert "set by      --set train.steps=3" in said
    assert said.index("a.gin:2: 2") < said.index("base.gin:1: 1")
    assert "default" in said


def test_why_of_a_macro_and_of_a_default(gin_file):
    config = configs.read(gin_file(GOOD))
    said = "\n".join(configs.why(config, "trainer.train.steps"))
    assert "written %STEPS" in said
    assert "a.gin:2: 10" in said
    assert "constructor's default" in "\n".join(configs.why(config, "train.seed"))
    with pytest.raises(configs.ConfigError, match="STEPS"):
        configs.why(config, "STEP")


def test_include_cycle_is_named(gin_file):
    gin_file("include 'a.gin'\n", "b.gin")
    found = problems(gin_file("include 'b.gin'\ntrainer.train.steps = 1\n"))
    assert any("cycle: a.gin -> b.gin -> a.gin" in p for p in found)


def test_set_takes_unquoted_strings_and_refuses_doubles(gin_file):
    file = gin_file(GOOD)
    assert configs.read(file, ["train.device=cpu"]).get("trainer.train.device") == "cpu"
    assert "already set" in problems(file, "train.seed=1", "train.seed=2")[0]
    assert "NAME=VALUE" in problems(file, "train.seed")[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=3\ntrain.keep=9", r"--set train.seed=3\ntrain.keep=9: one --set is one NAME=VALUE"),
        ("train.seed=3\rtrain.keep=9", "one --set is one NAME=VALUE"),
        ("import os #=3", "one --set is one NAME=VALUE"),
        ("include 'a.gin' #=3", "one --set is one NAME=VALUE"),
        ("train.device=\udcff", "not UTF-8"),
        ("train.clip_norm=-1e400", "-inf is no value"),
        ("train.seed=-1e400", "-inf is no value"),
        ("train.device={[1]: 2}", "unhashable"),
    ],
)
def test_what_no_set_can_be_is_one_error(gin_file, override, said):
    (found,) = problems(gin_file(GOOD), override)
    assert said in found
    found.encode()


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(gin_file, tmp_path):
    same = tmp_path / "same.gin"
    same.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert configs.read(str(same)).signature == configs.read(gin_file(GOOD)).signature


def test_why_follows_scopes_and_chains_of_macros_as_gin_does(gin_file):
    text = "optim.AdamW.eps = 1e-7\no/optim.AdamW.lr = 0.5\nB1 = 0.8\nPAIR = (%B1, 0.9)\nTOP = %PAIR\noptim.AdamW.betas = %TOP\n"
    config = configs.read(gin_file(GOOD + text), ["B1=0.7"])
    head, origin, *_ = configs.why(config, "o/p/AdamW.eps")
    assert head == "o/p/optim.AdamW.eps = 1e-07"
    assert origin.endswith("a.gin:6   (optim.AdamW.eps, which holds in the scope too)")
    said = "\n".join(configs.why(config, "o/p/AdamW.lr"))
    assert "o/p/optim.AdamW.lr = 0.5\n" in said
    assert "a.gin:5: 0.001 (optim.AdamW.lr)" in said
    assert "constructor's default" in configs.why(config, "o/optim.AdamW.weight_decay")[0]
    chain = "\n".join(configs.why(config, "AdamW.betas"))
    places = [
        chain.index(part)
        for part in ("= (0.7, 0.9)", "a.gin:10: %PAIR", "a.gin:9: (%B1, 0.9)", "--set B1=0.7: 0.7", "a.gin:8: 0.8")
    ]
    assert places == sorted(places)
    configs.apply(config)
    import torch

    import gin

    with gin.config_scope("o/p"):
        (group,) = configs.configured("optim.AdamW")([torch.nn.Parameter(torch.zeros(2))]).param_groups
    assert (group["eps"], group["lr"], group["betas"]) == (1e-7, 0.5, (0.7, 0.9))


def test_a_binding_that_another_replaced_names_it_and_a_default_below_is_none(gin_file):
    """A wider scope loses to a narrower one; that of an included file is a default, which may lose."""
    import torch

    import gin

    gin_file("optim.AdamW.lr = 0.1\n", "below.gin")
    above = (
        "include 'below.gin'\noptim.AdamW.eps = 1e-7\no/optim.AdamW.eps = 1e-6\no/optim.AdamW.lr = 0.3\nq/optim.AdamW.lr = 0.4\n"
    )
    config = configs.read(gin_file(above + "o/optim.AdamW.weight_decay = 0.5\n"))
    configs.apply(config)
    with gin.config_scope("o"):
        configs.configured("optim.AdamW")([torch.nn.Parameter(torch.zeros(2))], weight_decay=0.0)
    elsewhere, replaced, supplied = configs.unused(config)
    assert "a.gin:2: optim.AdamW.eps = 1e-07 took no effect: o/optim.AdamW.eps at " in replaced
    assert "a.gin:3 replaced it wherever it is built; remove it" in replaced
    assert "q/optim.AdamW.lr" in elsewhere
    assert "in that scope" in elsewhere
    assert "o/optim.AdamW.weight_decay" in supplied
    assert "the caller supplies this value itself" in supplied
    for text in (config.text(), configs.draft(gin_file(above)).text()):  # as a run folder and a sweep keep it, nothing is lost
        again = configs.read(gin_file(text, "again.gin"))
        assert [b.key for b in again.bindings.values() if b.included] == ["optim.AdamW.lr"]
        assert "optim.AdamW.lr = 0.1  # from an included file\n" in again.text()
        configs.apply(again)


def test_an_allowed_import_is_made_and_what_it_registers_may_be_used(gin_file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = "from core.registry import register\n@register('schedule')\nclass {0}:\n    def __init__(self, steps: int = 3): self.steps = steps\n"
    (tmp_path / "lab_single.py").write_text(module.format("Warm"))
    (tmp_path / "lab_package").mkdir()
    (tmp_path / "lab_package" / "__init__.py").write_text("__plugin__ = 'lab'\n")
    (tmp_path / "lab_package" / "inner.py").write_text(module.format("Cold"))
    file = gin_file(
        "import lab_single\nimport lab_package\nimport json\nimport os.path\nlab_single.Warm.steps = 4\nCold.steps = 5\n"
    )
    assert sum("would execute it" in p for p in problems(file)) == 4
    try:
        config = configs.read(file, allow_imports=True)
        assert not {"lab_single", "lab_package"} & sys.modules.keys()
        assert config.plugins() == []
        assert config.text().startswith("import json\nimport lab_package\nimport lab_single\nimport os.path\n")
        again = configs.read(gin_file(config.text(), "again.gin"), allow_imports=True)
        assert (again.signature, again.text()) == (config.signature, config.text())
        (found,) = problems(file, "lab.Cold.steps='x'", allow_imports=True)
        assert "lab.Cold.steps must be int" in found
        configs.apply(config)
        assert (configs.configured("lab_single.Warm")().steps, configs.configured("lab.Cold")().steps) == (4, 5)
        operative = configs.read(gin_file(configs.operative_text(), "operative.gin"), allow_imports=True)
        assert operative.effective() == config.effective()
        assert operative.imports.keys() == config.imports.keys()
        (found,) = problems(gin_file("import lab_nowhere\n", "nowhere.gin"), allow_imports=True)
        assert "nowhere.gin:1: import lab_nowhere: no module 'lab_nowhere' is importable here" in found
        (tmp_path / "lab_broken.py").write_text("raise OSError('no licence')\n")
        with pytest.raises(configs.ConfigError, match=r"broken\.gin:1: import lab_broken: OSError: no licence"):
            configs.apply(configs.read(gin_file("import lab_broken\n", "broken.gin"), allow_imports=True))
    finally:
        for name in ("lab_single.Warm", "lab.Cold"):
            registry.index().pop(name, None)
            registry._REGISTERED.pop(name, None)
        for name in [n for n in sys.modules if n.startswith("lab_")]:
            del sys.modules[name]


def test_macro_override_changes_the_signature(gin_file):
    file = gin_file(GOOD)
    assert configs.read(file).signature != configs.read(file, ["STEPS=11"]).signature
    assert configs.read(file).signature == configs.read(file, ["STEPS=10"]).signature


def test_type_error_through_a_macro_names_the_macros_line(gin_file):
    (found,) = problems(gin_file(GOOD.replace("STEPS = 10", "STEPS = 'ten'")))
    assert "a.gin:2" in found
    assert "through %STEPS" in found


@pytest.mark.parametrize(
    ("annotation", "value", "fits"),
    [
        ("int", 3, True), ("int", 3.0, False), ("float", 3, True), ("float", True, False), ("str | None", None, True),
        ("tuple[int, int]", (1, 2), True), ("tuple[int, int]", (1, 2, 3), False), ("tuple[int, ...]", (1, 2, 3), True),
        ("Sequence[float]", [1, 2.5], True), ("Sequence[float]", ["a"], False), ("dict[str, float]", {"a": 1.0}, True),
        ("dict[str, float]", {"a": "b"}, False), ("Literal['a', 'b']", "a", True), ("Literal['a', 'b']", "c", False),
        ("Literal[-1, 1]", -1, True), ("Literal[-1, 1]", -2, False), ("Literal[1]", True, False), ("Literal[Side.LEFT]", "x", True),
        ("Callable[..., nn.Module]", 3, False), ("SomethingElse", 3, True), ("Optional[int]", None, True), (None, object(), True),
    ],
)  # fmt: skip
def test_annotations(annotation, value, fits):
    assert configs.accepts(annotation, value) is fits


def test_a_binding_without_effect_is_found_after_building(gin_file):
    file = gin_file("trainer.train.optimizer = @optim.AdamW\noptim.AdamW.lr = 0.1\noptim.SGD.lr = 0.2\nrgb/optim.AdamW.lr = 0.3\n")
    config = configs.read(file)
    configs.apply(config)
    import torch

    configs.configured("optim.AdamW")([torch.nn.Parameter(torch.zeros(2))])
    lines = configs.unused(config)
    assert len(lines) == 3  # train was not called, SGD is not built, nothing is built in scope rgb
    assert any("optim.SGD.lr" in line and "nothing in this config builds that component" in line for line in lines)
    assert any("rgb/optim.AdamW.lr" in line for line in lines)


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("trainer.train.task = @optim.SGD", r"task takes a component that makes Task, and optim\.SGD is of kind optimizer; it may be sdtps\.ReID$"),
        ("WRONG = @optim.SGD\ntrainer.train.schedule = %WRONG", "schedule takes a component that makes Callable, .* may be schedules.Constant, schedules.Cosine"),
        ("sdtps.ReID.layout = @sdtps.TokenSparse", "makes Layout, .* kind module; it may be sdtps.MSVR310, sdtps.RGBNT100, sdtps.RGBNT201$"),
        ("sdtps.TriModalReID.tokens = @sdtps.PKPlan", "tokens takes a component that makes Module, and sdtps.PKPlan is of kind plan; it may be"),
    ],
)  # fmt: skip
def test_a_component_in_a_place_for_another_is_an_error_before_anything_is_built(gin_file, binding, said):
    config = configs.read(gin_file(f"{binding}\nsdtps.ReID.junk = 'camera'\n"))
    with pytest.raises(configs.ConfigError, match=said) as caught:
        configs.apply(config)
    assert len(caught.value.problems) == 1


def test_every_default_is_what_its_own_annotation_takes():
    for name in registry.plugins():
        registry.load_plugin(name)
    known = registry.registered()
    checked = 0
    for component in known.values():
        for parameter in inspect.signature(component.cls).parameters.values():
            if parameter.default in {r.cls for r in known.values()}:
                assert configs._makes(parameter.default, configs._wanted(component.cls, parameter.name)), (
                    component.name,
                    parameter.name,
                )
                checked += 1
    assert checked > 30


def test_a_value_that_the_caller_supplies_is_found(gin_file):
    config = configs.read(gin_file("optim.AdamW.lr = 0.1\n"))
    configs.apply(config)
    import torch

    made = configs.configured("optim.AdamW")([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    assert made.param_groups[0]["lr"] == 0.5
    (line,) = configs.unused(config)
    assert "the caller supplies this value itself" in line


def test_checking_imports_no_torch(gin_file):
    code = f"import sys; from core import config; config.read({gin_file(GOOD)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_gin_is_the_library_and_its_version_is_pinned():
    from importlib.metadata import version
    from pathlib import Path

    import gin

    assert version("gin-config") == "0.5.0"
    assert hasattr(gin, "parse_config")
    folder = Path(__file__).parents[2] / "gin"
    assert not list(folder.rglob("__init__.py")), "gin/__init__.py would shadow the gin library"
    assert not list(folder.rglob("*.py"))
