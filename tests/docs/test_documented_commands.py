"""Every command in every document is executed at a tiny size; what cannot run here is read by the parser that would read it.

A command is a line of a ```bash or ```console block, an indented line that begins with one of PROGRAMS, a line of a ```text
block that begins with `repro` (the usage notes; what follows two spaces is explanation), or a code span in running text.
Words in capitals stand for something of the reader's, and are replaced by something real: STAND_INS. A command that no rule
knows fails.
"""

import argparse
import ast
import dataclasses
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from core import config as configs
from core import registry
from repro import cli

TOP = Path(__file__).parents[2]
PROGRAMS = ("python", "python3", "repro", "make", "pip", "pytest", "ruff", "mypy", "slurm/local_cluster.sh")
SKIPPED = ("runs", "data", "node_modules")
TEMPLATE, EXAMPLE = "repro/template/README.md", "examples/token_merging/README.md"

TRAINING = ("trainer.train.threads=1", "trainer.train.eval_first=False")
REID = (
    *TRAINING, "STEPS=2", "sdtps.PKPlan.identities=3", "sdtps.PKPlan.instances=2", "sdtps.CLIPVisionTransformer.width=16",
    "sdtps.CLIPVisionTransformer.heads=2",
)  # fmt: skip
SCENES = (
    *TRAINING, "STEPS=2", "DIM=16", "HEADS=2", "HIDDEN=16", "ENCODER_LAYERS=1", "DECODER_LAYERS=1", "QUERIES=3", "TRUNK_WIDTH=4",
    "TRUNK_CHANNELS=8", "text.HashedText.dim=8", "sam3_fusion.shapes_sample.train=12", "sam3_fusion.shapes_sample.test=2",
)  # fmt: skip
ROOMS = (
    *TRAINING,
    "STEPS=2",
    "BATCH=2",
    "sam.DFormer.dims=(8, 16, 16, 32)",
    "sam.DFormer.heads=(2, 2, 2, 4)",
    "sam.TrainTransform.crop=(32, 32)",
)
# What makes a run of a file take seconds; {rgbnt}, {pacs} and {rooms} are tiny samples in the published layouts.
TINY = {
    "gin/sdtps_rgbnt.gin": (*REID, "ROOT={rgbnt}", "sdtps.CLIPVisionTransformer.layers=1"),
    "token_merging:rgbnt.gin": (*REID, "ROOT={rgbnt}", "sdtps.CLIPVisionTransformer.layers=1"),
    "token_merging:pruned.gin": (*REID, "ROOT={rgbnt}", "LAYERS=2"),
    "gin/sam_nyu.gin": (*ROOMS, "ROOT={rooms}"),
    "gin/sap_pacs.gin": (
        *TRAINING,
        "EPOCHS=1",
        "EPISODES=1",
        "WIDTHS=(4, 4, 8, 8)",
        "IMAGE=24",
        "K_SHOT=1",
        "N_QUERY=1",
        "sap.FewShot.eval_episodes=2",
        "ROOT={pacs}",
    ),
    "gin/sam3_fusion.gin": SCENES,
    "my_paper:base.gin": ("STEPS=2",),
}
MAKERS = {
    "rgbnt-sample": (
        "train_identities=6", "train_cameras=2", "train_images=2", "test_identities=4", "test_images=2", "sharing=1", "height=64", "width=32",
    ),
    "pacs-sample": ("per_cell=6", "size=24"),
    "rgbd-sample": ("train=4", "test=2", "height=32", "width=32"),
    "shapes-sample": ("train=12", "test=2"),
}  # fmt: skip
NEEDS_NPM = ("emoji7", "emoji-scenes")
# Files that need no data of the reader's and still cannot run here: they are read and checked.
ELSEWHERE = {
    "gin/sam3_fusion/emoji.gin": "downloads by npm",
    "gin/sam3_fusion/issue17/": "trains a teacher and its students, minutes",
}
CHECKED_ON = {
    "rgbnt201": "rgbnt",
    "nyudepthv2": "rooms",
    "pacs": "pacs",
    "emoji7-folder": "pacs",  # of another layout: a finding too
    "rgbnt-sample-files": "rgbnt",
    "prompted-scenes": "scenes",
}
# One claim a plugin that takes milliseconds, so that `repro verify` is what runs and not every check of every paper.
QUICK = {
    "sam": "SAM-1",
    "sap": "FACT-11",
    "sdtps": "SDTPS-10",
    "sam3_fusion": "SAM3-3",
    "token_merging": "ToMe-2",
    "my_paper": "MY_PAPER-1",
}


# --- the commands of a document -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Documented:
    where: str
    line: int
    text: str
    mention: bool = False  # a code span in running text, which may leave out what the sentence says

    def __str__(self):
        return f"{self.where}:{self.line}"


def documents():
    found = (p.relative_to(TOP) for p in TOP.rglob("*.md") if not p.is_symlink())
    return sorted(p for p in found if not any(part.startswith(".") or part in SKIPPED for part in p.parts))


def commands_of(text):
    """(line number, command, whether it is a code span) of a document's text."""
    fence, told = None, None
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r"\s*```(\w*)", line)
        if opening:
            fence = opening[1] if fence is None else None
            continue
        said = line.strip()
        if fence in ("bash", "console", "sh"):
            said = said.removeprefix("$ ")
            whole = f"{told} {said}" if told else said
            told = whole.removesuffix("\\").strip() if whole.endswith("\\") else None
            if not told and whole and not whole.startswith("#"):
                yield number, whole, False
        elif fence == "text":
            if re.match(r"(repro|python -m repro\S*) ", said):
                yield number, re.split(r"  +", said)[0], False
        elif fence is None and line.startswith("    ") and said.split(" ")[0] in PROGRAMS:
            yield number, said, False
        elif fence is None:
            for span in re.findall(r"`([^`]+)`", line):
                if re.match(r"(repro|python -m repro\S*|python (docs|benchmarks)/\S*|make)( |$)", span) and span not in (
                    "repro",
                    "make",
                ):
                    yield number, span, True


@functools.cache
def documented():
    """Each different command once, with the first place where it stands; those of a package of its own are apart."""
    found = {}
    for document in documents():
        for number, text, mention in commands_of((TOP / document).read_text(encoding="utf-8")):
            for single in alternatives(text):
                owner = str(document) if str(document) in (TEMPLATE, EXAMPLE) else ""
                found.setdefault((owner, normal(single)), Documented(str(document), number, single, mention))
    return list(found.values())


def normal(text):
    return re.sub(r"^python3? -m repro\.(\w+)", r"repro \1", " ".join(shlex.split(text, comments=True)))


def alternatives(text):
    """The commands that a synopsis stands for: `make|check` is two, `[--count]` is given."""
    text = re.sub(r"\[([^\]\[]*)\](?=\s|$|…)", r"\1", text) if re.search(r"\s\[(-|[A-Z])", text) else text
    text = text.replace("--set …", "--set NAME=VALUE")
    plain = re.split(r"\s#\s", text)[0]
    choices = re.findall(r"(?<=\s)[a-z]+(?:\|[a-z]+)+(?=\s|$)", plain)
    for chosen in itertools.product(*(c.split("|") for c in choices)):
        one = plain
        for choice, pick in zip(choices, chosen):
            one = one.replace(choice, pick, 1)
        yield one.strip()


def split(text):
    """The single commands of a line, as words."""
    words, found = [w for w in shlex.split(text, comments=True) if w != "…"], [[]]  # a lone … is what the reader adds
    for word in words:
        if word in ("&&", ";", "||"):
            found.append([])
        elif word.endswith(";"):
            found[-1].append(word[:-1])
            found.append([])
        else:
            found[-1].append(word)
    return [f for f in found if f]


def test_commands_are_found_where_they_stand():
    text = """
`repro list` and `--gin`
    repro new x        # a comment
    not a command
```bash
python -m repro.run --gin a.gin \\
    --set A=1
# nothing
```
```text
repro data list       every one
```
```python
repro no
```
"""
    assert [(number, said) for number, said, _ in commands_of(text)] == [(2, "repro list"), (3, "repro new x        # a comment"), (7, "python -m repro.run --gin a.gin --set A=1"), (11, "repro data list")]  # fmt: skip
    assert split("repro data list && make x; pip install y  # z") == [
        ["repro", "data", "list"],
        ["make", "x"],
        ["pip", "install", "y"],
    ]
    assert list(alternatives("repro data make|check NAME [--root DIR]  # a|b")) == [
        "repro data make NAME --root DIR",
        "repro data check NAME --root DIR",
    ]
    named = {str(d) for d in documents() if list(commands_of((TOP / d).read_text(encoding="utf-8")))}
    assert {"README.md", "CONTRIBUTING.md", "docs/commands.md", "plugins/sdtps/README.md", EXAMPLE, TEMPLATE} <= named
    assert len(documented()) > 60


# --- a place where they can run -------------------------------------------------------------------------------------------


class Place:
    """A folder with what a reader would have: samples, a few golden cases, finished runs, a sweep. Made when first wanted."""

    def __init__(self, folder, rgbnt):
        self.folder, self._samples, self.done, self.command = folder, {"rgbnt": rgbnt}, {}, None
        (folder / "tests" / "golden").mkdir(parents=True)
        for case in ("sap_clipped", "reid_eval_scene"):
            shutil.copy(TOP / "tests" / "golden" / f"{case}.safetensors", folder / "tests" / "golden")
        (folder / "papers").mkdir()
        (folder / "docs").mkdir()
        (folder / "site").mkdir()

    def installed(self, document):
        """What makes a child process one in which the document's own package is installed."""
        name = {TEMPLATE: "my_paper", EXAMPLE: "token_merging"}.get(document)
        if name is None:
            return lambda: None
        site, package = self.folder / "site", TOP / "examples" / "token_merging" if name == "token_merging" else self.package()
        info = site / f"{name}-0.1.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[repro.plugins]\n{name} = {name}\n")
        paths = [str(package), str(site)]

        def there():
            sys.path[:0] = paths
            for cached in (registry.plugins, registry.index, registry.plugin_problems):
                cached.cache_clear()

        return there

    def package(self):
        """The folder of a freshly made `repro new my_paper`."""
        if not (self.folder / "site" / "my_paper").is_dir():
            self.do("new", "my_paper", "--into", "site")
        return self.folder / "site" / "my_paper"

    def do(self, *words, before=None, folder=None, status=(0,)):
        done = self.command(*map(str, words), before=before, folder=folder or self.folder)
        assert done.status in status, f"repro {shlex.join(map(str, words))}\n{done.err}{done.out[-2000:]}"
        return done

    def once(self, *words, owner="", folder=None, status=(0,)):
        """`repro WORDS` where the document's reader is; what ran already is not run again."""
        used = EXAMPLE if any("token_merging" in str(word) for word in words) else owner if owner == TEMPLATE else ""
        key = (used, *map(str, words))
        if key not in self.done:
            self.done[key] = self.do(*words, before=self.installed(used), folder=folder, status=status)
        return self.done[key]

    def sample(self, name):
        if name not in self._samples:
            maker = {"pacs": "pacs-sample", "rooms": "rgbd-sample", "scenes": "shapes-sample"}[name]
            root = self.folder / "samples" / name
            self.do("data", "make", maker, "--root", root, *sets(MAKERS[maker]))
            self._samples[name] = root
        return self._samples[name]

    def tiny(self, gin):
        """`--set` words that make a run of the file small."""
        return sets(re.sub(r"\{(\w+)\}", lambda m: str(self.sample(m[1])), s) for s in TINY[gin])

    def run(self, stem):
        """A finished run whose folder's name begins with the stem: the one that the documented command makes."""
        (gin,) = (g for g in TINY if Path(g.rpartition(":")[2]).stem == stem)
        done = self.once("run", "--gin", gin, *self.tiny(gin), "--no-profile")
        return re.search(r"^run folder:? +(\S+)", done.out, re.M)[1]

    def sweep(self):
        name = "documented"
        if not (self.folder / "runs" / "sweeps" / name).is_dir():
            gin = "gin/sdtps_rgbnt.gin"
            self.do("sweep", "--gin", gin, *self.tiny(gin), "--grid", "SEED=1", "--no-profile", "--name", name)
        return name

    def another(self):
        """The run folder of the sweep: the main job with another seed."""
        made = json.loads((self.folder / "runs" / "sweeps" / self.sweep() / "sweep.json").read_text())
        return str(Path("runs") / made["runs"][0]["name"])

    def outcome(self, name):
        path = self.folder / name
        if not path.is_file():
            words = {
                "verify.json": ("verify", "sap", "--id", QUICK["sap"]),
                "profile.json": ("profile", "--gin", "gin/sdtps_rgbnt.gin", "--count"),
            }
            self.do(*words[name], "--json", path)
        return name


@pytest.fixture(scope="session")
def _place(tmp_path_factory, sample):
    return Place(tmp_path_factory.mktemp("reader"), sample)


@pytest.fixture
def place(_place, command):
    _place.command = command
    return _place


def sets(bindings):
    return [word for b in bindings for word in ("--set", b)]


# --- the rules ------------------------------------------------------------------------------------------------------------


class Rules:
    """How each program and each verb is made small enough to run, or read where it cannot run."""

    def __init__(self, place, said):
        self.place, self.said = place, said
        self.folder = place.package() if said.where == TEMPLATE else place.folder

    def carry_out(self, words):
        if words[0] in ("python", "python3"):
            if words[1] == "-m":
                module, words = words[2], words[2:]
                if module.partition(".")[0] == "repro":
                    return self.verb(*([module.partition(".")[2]] if "." in module else []), *words[1:])
            else:
                return self.script(words[1], words[2:])
        if words[0] == "repro":
            return self.verb(*words[1:])
        rule = getattr(self, f"_{'activate' if words[0] == '.' else Path(words[0]).stem}", None)
        assert rule, f"{self.said}: no rule knows {shlex.join(words)}"
        return rule(*words[1:])

    def do(self, *words, status=(0,)):
        return self.place.once(*words, owner=self.said.where, folder=self.folder, status=status)

    def small(self, words, overrides, gin):
        """The words, with what they set replaced by the tiny size where both set the same."""
        assert configs.draft(gin).config(overrides).bindings
        tiny = self.place.tiny(gin)
        named = {word.partition("=")[0] for word in tiny[1::2]}
        kept = [i for i, word in enumerate(words) if not (word in overrides and word.partition("=")[0] in named)]
        kept = [i for i in kept if not (words[i] == "--set" and i + 1 not in kept)]
        return [*(words[i] for i in kept), *tiny]

    # programs other than ours: what they name must exist

    def _make(self, *targets):
        known = re.findall(r"^([\w-]+):", (TOP / "Makefile").read_text(), re.M)
        assert targets
        assert set(targets) <= set(known), f"{self.said}: the Makefile has no target {set(targets) - set(known)}"

    def _pip(self, action, *words):
        assert action == "install"
        parser = argparse.ArgumentParser()
        parser.add_argument("-c", action="append", default=[])
        parser.add_argument("-e", action="append", default=[])
        parser.add_argument("names", nargs="*")
        given = parser.parse_args(words)
        assert given.names or given.e
        home = TOP / "repro" / "template" if self.said.where == TEMPLATE else TOP
        assert all((home / file).is_file() for file in given.c)
        for name in given.e:
            where, _, extras = name.partition("[")
            project = tomllib.loads((home / where / "pyproject.toml").read_text())["project"]
            wanted = set(filter(None, extras.rstrip("]").split(",")))
            assert wanted <= set(project.get("optional-dependencies", {})), f"{self.said}: {name}"
        pinned = (TOP / "constraints.txt").read_text().split()
        for name in given.names:
            extras = re.fullmatch(r"ginrepro\[(\w+)\]", name)
            assert name in pinned or (extras and extras[1] in project_extras()), (
                f"{self.said}: {name} is not what constraints.txt pins"
            )

    def _venv(self, folder):
        assert folder == ".venv"

    def _activate(self, script):
        assert script == ".venv/bin/activate"

    def _pytest(self, *words):
        if self.said.where != TEMPLATE:
            recipe = re.search(r"^test:.*\n\t(.*)", (TOP / "Makefile").read_text(), re.M)[1]
            assert recipe.endswith(" ".join(("-m pytest", *words))), f"{self.said}: `make test` runs {recipe}"
        self._tool("pytest")

    def _ruff(self, *words):
        self._tool("ruff")

    def _mypy(self, *words):
        self._tool("mypy")

    def _tool(self, name):
        home = TOP / "repro" / "template" if self.said.where == TEMPLATE else TOP
        listed = tomllib.loads((home / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
        assert any(one.startswith(name) for one in listed), f"{self.said}: {name} is not in the extra dev"

    def _local_cluster(self, action):
        script = TOP / "slurm" / "local_cluster.sh"
        assert os.access(script, os.X_OK)
        assert re.search(rf"^\s*\(?({action}|[\w|]*\b{action}\b[\w|]*)\)", script.read_text(), re.M), f"{self.said}: {action}"

    def _eval(self, text):
        inner = re.fullmatch(r"\$\((.*)\)", text)
        assert inner, text
        self.carry_out(shlex.split(inner[1]))

    def script(self, path, words):
        """A script of benchmarks/ or docs/: minutes of work, so its own parser reads the words and then it is stopped."""
        assert re.fullmatch(r"(benchmarks|docs)/\w+\.py", path), f"{self.said}: no rule knows {path}"
        assert (TOP / path).is_file(), f"{self.said}: there is no {path}"
        assert all((TOP / word).is_file() for word in words if word.endswith(".md")), f"{self.said}: no such document"
        if "argparse" not in (TOP / path).read_text():
            ast.parse((TOP / path).read_text())
            assert not words, f"{self.said}: {path} takes no arguments"
            return

        def read():  # in a child process
            import argparse
            import runpy

            parse = argparse.ArgumentParser.parse_args

            def stop(parser, *given, **more):
                parse(parser, *given, **more)
                raise SystemExit("read")

            argparse.ArgumentParser.parse_args = stop
            sys.argv = [path, *words]
            sys.path[:0] = [str(Path(path).parent)]
            runpy.run_path(path, run_name="__main__")

        done = self.place.command("list", before=read, folder=TOP)
        assert "SystemExit: read" in done.err, f"{self.said}: {done.err}"

    # our verbs

    def verb(self, *words):
        if not words:
            words = ("--help",)
        words = [re.sub(r"^VERB$", "list", w) for w in words]
        name = words[0]
        if name == "--help" or (name in cli.available() and words[1:] == ["--help"]):
            return cli.parser_of(name).format_help() if name != "--help" else self.do(*words)
        if name in ("--version", "completion"):
            return self.do(*words)
        assert name in cli.available(), f"{self.said}: no verb {name}"
        if self.said.mention and self.mentioned(name, words[1:]):
            return None
        return getattr(self, f"verb_{name}")(self.filled(name, words[1:]))

    def mentioned(self, verb, words):
        """Whether it is only part of a command, as a sentence names one; its options and names must exist even so."""
        parser = cli.parser_of(verb)
        known = {option for action in parser._actions for option in action.option_strings}
        assert {w for w in words if w.startswith("--")} <= known, f"{self.said}: {verb} has no such option"
        if verb == "data" and "--root" not in words and words[:1] != ["list"]:
            assert words[1].replace("-", "_") in {
                c.name.split(".", 1)[1] for c in registry.index().values() if c.kind.startswith("dataset_")
            }
            return True
        needed = {
            "run": "--gin",
            "profile": "--gin",
            "export": "--",
            "report": "",
            "compare": "",
            "sweep": "--",
            "cancel": "",
            "new": "",
        }
        return (verb in needed and not any(w.startswith(needed[verb]) for w in words)) or words[-1:] in (["--json"], ["--set"])

    def filled(self, name, words):
        """The words with something real in the place of what a reader has to put there."""
        return [real for before, word in zip(("", *words), words) for real in self.stand_in(name, before, word)]

    def stand_in(self, verb, before, word):
        place = self.place
        if word == "FILE" and before in ("--json", "--markdown", "--claims"):
            return [place.outcome("verify.json") if before == "--claims" else "written.out"]
        real = {
            "FILE": "gin/sdtps_rgbnt.gin", "RECIPE": "gin/sdtps/rgbnt201.gin", "gin/x.gin": "gin/sdtps_rgbnt.gin", "PLUGIN": "sap",
            "my_paper": "my_paper", "NAME=VALUE": "STEPS=3", "NAME=…": "ROOT=/data/any", "NAME=A,B": "SEED=0,1", "ROOT=…": "ROOT=/data/any",
        }  # fmt: skip
        if before == "--baseline":
            return ["sdtps_rgbnt"]
        if before == "--sweep" and (TOP / word).is_file():
            return [str(TOP / word)]
        if verb == "config" and word == "NAME":
            return ["SEED"]
        if word in real:
            return [real[word]]
        if word in ("verify.json", "profile.json"):
            return [place.outcome(word)]
        if word == "SWEEP":
            return [place.sweep()]
        if word == "DIR":
            return [
                {"verify": "tests/golden", "export": "made"}.get(verb, "made") if before != "--run" else place.run("sam3_fusion")
            ]
        if word == "runs/b" or (word == "RUN" and before == "RUN"):
            return [place.another()]
        if word in ("RUN", "RUN…", "runs/a", "[RUN…]"):
            if verb == "cancel":
                return ["sdtps_rgbnt"]
            return [place.run("sam3_fusion" if verb == "export" else "sdtps_rgbnt")]
        stem = re.fullmatch(r"runs/(\w+)-(\*|…|[0-9a-f]{8})", word)
        return [place.run(stem[1])] if stem else [word]

    def parsed(self, verb, words):
        try:
            return cli.parser_of(verb).parse_args([str(w) for w in words])
        except SystemExit:
            pytest.fail(f"{self.said}: the parser of {verb} does not take {shlex.join(map(str, words))}")

    def verb_run(self, words, verb="run", more=("--no-profile",)):
        args = self.parsed(verb, words)
        given = [s.partition("=")[0] for s in args.overrides]
        if args.gin in TINY and "WEIGHTS" not in given:
            return self.do(
                verb,
                *(words if ":" in args.gin else self.small(words, args.overrides, args.gin)),
                *more,
                *(self.place.tiny(args.gin) if ":" in args.gin else ()),
            )
        draft = configs.draft(args.gin)
        missing = [name for name in draft.required() if name not in given]
        on_data = bool(draft.required()) or "ROOT" in given or args.gin.startswith(tuple(ELSEWHERE))
        assert on_data, f"{self.said}: {args.gin} runs on a sample, and TINY has no size for it"
        assert not missing or "…" in self.said.text, f"{self.said}: {args.gin} also requires {missing}"
        assert draft.config([*args.overrides, *(f"{name}='/data/any'" for name in missing)]).bindings
        return None

    def verb_profile(self, words):
        if self.parsed("profile", words).count:
            return self.do("profile", *words)
        return self.verb_run(words, "profile", ("--repeats", "1"))

    def verb_config(self, words):
        args = self.parsed("config", words)
        if args.file == "diff":
            assert len(args.runs) == 2
        return self.do("config", *words)

    def verb_list(self, words):
        assert self.do("list", *words).out.strip()

    def verb_data(self, words):
        args = self.parsed("data", words)
        if args.action == "list":
            return self.do("data", *words)
        kind = {"make": "dataset_maker", "check": "dataset_checker"}[args.action]
        known = {c.name.split(".", 1)[1].replace("_", "-"): c for c in registry.index().values() if c.kind == kind}
        name = {"make": "rgbnt-sample", "check": "rgbnt201"}[args.action] if args.name == "NAME" else args.name
        assert name in known, f"{self.said}: nothing called {name} to {args.action}"
        assert args.root, f"{self.said}: without --root"
        words = [name if w == "NAME" else w for w in words]
        if name in NEEDS_NPM:
            from repro.data import _options

            return _options(known[name], args.options)
        if args.action == "make":
            given = {s.partition("=")[0] for s in args.options}
            words[words.index("--root") + 1] = f"made/{name}-{len(given)}"
            return self.do("data", *words, *sets(s for s in MAKERS[name] if s.partition("=")[0] not in given))
        # A tiny sample has not the published counts: that is what the check has to say, as findings and no error of its own.
        at = words.index("--root") + 1
        words[at] = str(self.place.sample(CHECKED_ON[name]))
        done = self.do("data", *words, status=(0, 1))
        assert re.search(r"^(ok|error|warning) ", done.out, re.M)
        assert not re.search(r"^error:", done.err, re.M), done.err
        return done

    def verb_verify(self, words):
        args = self.parsed("verify", words)
        if args.golden and not args.plugins and "--id" not in words:
            return self.do("verify", *words)
        words = [w for w in words if w != "--slow"]
        chosen = args.plugins or [p for p in registry.plugins() if p in QUICK]
        return self.do("verify", *words, *itertools.chain.from_iterable(("--id", QUICK[p]) for p in chosen if not args.id))

    def verb_claims(self, words):
        args = self.parsed("claims", words)
        if "runs" in words:
            self.place.run("sdtps_rgbnt")
        if args.check and not args.plugin:  # every check of every paper takes a minute; tests/repro/test_claims.py has the rest
            (self.place.folder / "site" / "none").mkdir(exist_ok=True)
            return self.do("claims", *(w for w in words if w != "--check"))
        return self.do("claims", *words)

    def verb_report(self, words):
        for word in self.parsed("report", words).runs:
            if word == "runs":
                self.place.run("sdtps_rgbnt")
        return self.do("report", *words)

    def verb_compare(self, words):
        self.parsed("compare", words)
        return self.do("compare", *words)

    def verb_sweep(self, words):
        args = self.parsed("sweep", words)
        if args.resume:
            return self.do("sweep", *words)
        if args.sweep and args.sweep == "gin/sdtps_rgbnt.gin":
            path = self.place.folder / "sweep.gin"
            path.write_text("GIN = 'gin/sdtps_rgbnt.gin'\nGRID = ['SEED=0..2']\n")
            words = [str(path) if w == args.sweep else w for w in words]
        elif not args.gin and not args.sweep:  # `repro sweep … --dry-run`
            words = ["--gin", "gin/sdtps_rgbnt.gin", "--grid", "SEED=0..2", *words]
        return self.do("sweep", *words, *([] if args.dry_run else ["--dry-run"]))

    def verb_status(self, words):
        self.place.sweep()
        return self.do("status", *words)

    def verb_cancel(self, words):
        self.place.sweep()
        return self.do("cancel", *words)

    def verb_export(self, words):
        args = self.parsed("export", words)
        if self.said.where == "docs/commands.md":  # each form at a small size: tests/repro/test_export.py
            return args.gin and configs.draft(args.gin).config(args.overrides)
        small = [] if args.only else ["--only", "scorer"]
        if args.gin:
            words = self.small(words, args.overrides, args.gin)
        return self.do("export", *words, *small, *([] if args.format else ["--format", "torch"]))

    def verb_new(self, words):
        self.parsed("new", words)
        return self.do("new", *words)


def project_extras():
    return tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("said", documented(), ids=str)
def test_documented_command(said, place):
    rules, commands = Rules(place, said), split(said.text)
    assert commands, f"{said}: nothing in it is a command"
    for words in commands:
        rules.carry_out(words)


def test_a_command_that_no_rule_knows_fails(place):
    for text in ("conda install repro", "python elsewhere.py", "repro fly", "python benchmarks/none.py", "make coffee"):
        with pytest.raises(AssertionError):
            Rules(place, Documented("README.md", 1, text)).carry_out(shlex.split(text))


def test_a_broken_command_fails(place):
    for text in (
        "repro run --gin gin/sdtps/rgbnt201.gin --set ROOT=/d --set WEIGHTS=/w --set NO_SUCH=1",
        "repro run --gin gin/sdtps/rgbnt201.gin --set WEIGHTS=/w",
        "repro run --gin gin/no_such.gin --set ROOT=/d",
        "repro run --gin gin/sdtps/rgbnt201.gin --root /d",
        "repro data check rgbnt202 --root DIR",
        "repro config gin/sdtps_rgbnt.gin --why NO_SUCH",
    ):
        with pytest.raises((AssertionError, configs.ConfigError, pytest.fail.Exception)):
            Rules(place, Documented("README.md", 1, text)).carry_out(shlex.split(text))
