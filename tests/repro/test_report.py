"""Reports are made from run folders alone: gaps stay gaps, n is stated, everything is escaped, and the page works offline."""

import argparse
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from repro import cli, gather, report


def make(
    root,
    name,
    effective,
    metrics=None,
    *,
    config="gin/x.gin",
    rows=(),
    state="finished",
    expected=None,
    tables=(),
    sample=False,
    message="",
):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.gin").write_text("# asked\n")
    info = {
        "effective": effective,
        "config": config,
        "seed": 0,
        "source": {"commit": "a" * 40, "clean": True},
        "environment": {"versions": {"torch": "2"}},
    }
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 3, "steps": 9, "message": message}))
    if metrics is not None:
        (folder / "result.json").write_text(json.dumps({"metrics": metrics, "expected": expected or {}, "tables": list(tables)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "data.json").write_text(json.dumps({"name": "toy", "sample": sample, "fingerprint": "f" * 16}))
    return folder


def effective(ratio, seed):
    return {"sdtps.TokenSparse.sparse_ratio": str(ratio), "trainer.train.seed": str(seed)}


@pytest.fixture
def sweep(tmp_path):
    root = tmp_path / "runs"
    for ratio, base in ((0.3, 0.40), (0.5, 0.50)):
        for seed in range(3):
            rows = [{"step": s, "loss": 2.0 / (s + 1)} for s in range(5)] + [{"step": 5, "eval": {"mAP[camera]": base}}]
            make(
                root,
                f"r{ratio}-{seed}",
                effective(ratio, seed),
                {"mAP[camera]": base + 0.01 * seed},
                rows=rows,
                expected={"mAP[camera]": 0.79},
            )
    return root


def test_seeds_are_one_group_and_labels_name_what_differs(sweep):
    groups = gather.groups(gather.collect([str(sweep)]))
    assert [g.label for g in groups] == ["sparse_ratio = 0.3", "sparse_ratio = 0.5"]
    assert [len(g.runs) for g in groups] == [3, 3]
    spread = gather.spread(groups[0], "mAP[camera]")
    assert spread.mean == pytest.approx(0.41)
    assert spread.deviation == pytest.approx(0.01)
    assert spread.text() == "0.4100 ± 0.0100 (n=3)"


def test_failed_seeds_and_nan_are_gaps_and_counted(sweep):
    make(sweep, "failed", effective(0.3, 7), None, state="failed", message="NonFinite: step 4: loss term id")
    make(sweep, "nan", effective(0.3, 8), {"mAP[camera]": None})
    (group, _) = gather.groups(gather.collect([str(sweep)]))
    spread = gather.spread(group, "mAP[camera]")
    assert (spread.n, spread.missing) == (3, 2)
    assert "2 missing" in spread.text()
    page = report.build(gather.collect([str(sweep)]))
    states = next(s for s in page if s.id == "states")
    assert ["failed", "failed", "3/9", "NonFinite: step 4: loss term id"] in states.tables[0].rows


def test_paired_test_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    runs = [
        gather.Run(None, {"effective": {"trainer.train.seed": str(i)}}, {"metrics": {"m": v}}, None)
        for i, v in enumerate((1.0, 2.0, 4.0))
    ]
    others = [
        gather.Run(None, {"effective": {"trainer.train.seed": str(i)}}, {"metrics": {"m": v}}, None)
        for i, v in enumerate((0.5, 1.8, 3.0))
    ]
    p, pairs = gather.paired(gather.Group("a", {}, runs), gather.Group("b", {}, others), "m")
    assert pairs == 3
    assert p == pytest.approx(scipy.ttest_rel([1.0, 2.0, 4.0], [0.5, 1.8, 3.0]).pvalue)
    assert gather.paired(gather.Group("a", {}, runs[:1]), gather.Group("b", {}, others), "m") == (None, 1)


def planned(root, gin, cells):
    """A sweep's plan as `repro sweep` writes it, over run folders by name."""
    folder = root / "sweeps" / "s"
    (folder / "base").mkdir(parents=True)
    runs = [{"name": name, "gin": gin, "overrides": [], "cells": of} for name, of in cells.items()]
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    return folder / "base" / gin.rpartition("/")[2]


def test_settings_are_named_and_ordered_as_the_sweep_has_them(tmp_path):
    root = tmp_path / "runs"
    names = {0.5: "half", 0.3: "a third", 0.7: ""}
    cells = {f"r{r}-{s}": [["preset", n], ["SEED", str(s)]] for r, n in names.items() if n for s in range(2)}
    base = planned(root, "gin/sdtps_rgbnt.gin", cells)
    for ratio in names:
        for seed in range(2):
            make(root, f"r{ratio}-{seed}", effective(ratio, seed), {"m": ratio}, config=str(base))
    runs = gather.collect([str(root)])
    assert [g.label for g in gather.settings(runs)] == ["half", "a third", "sparse_ratio = 0.7"]
    assert {r.config for r in runs} == {"gin/sdtps_rgbnt.gin"}  # what was asked, not the sweep's copy of it
    assert "half" in report.markdown(report.build(runs), "t")


def test_a_plan_of_another_form_names_nothing_and_breaks_nothing(tmp_path):
    base = planned(tmp_path, "gin/x.gin", {"a": [["preset", "one"]]})
    plan = tmp_path / "sweeps" / "s" / "sweep.json"
    plan.write_text(json.dumps({"runs": [{"name": "a", "cells": None}, {"name": "b", "gin": 3, "cells": []}, 4]}))
    for name, ratio in (("a", 0.3), ("b", 0.5)):
        make(tmp_path, name, effective(ratio, 0), {"m": 1.0}, config=str(base))
    runs = gather.collect([str(tmp_path)])
    assert [g.label for g in gather.settings(runs)] == ["sparse_ratio = 0.3", "sparse_ratio = 0.5"]
    assert {r.config for r in runs} == {str(base)}


def test_a_name_that_two_settings_share_names_neither(tmp_path):
    root = tmp_path / "runs"
    planned(root, "gin/x.gin", {"a": [["preset", "same"]], "b": [["preset", "same"]]})
    for name, ratio in (("a", 0.3), ("b", 0.5)):
        make(root, name, effective(ratio, 0), {"m": 1.0})
    assert [g.label for g in gather.settings(gather.collect([str(root)]))] == ["sparse_ratio = 0.3", "sparse_ratio = 0.5"]


def test_a_setting_planned_under_two_names_has_both_and_counts_a_seed_once(tmp_path):
    root = tmp_path / "runs"
    planned(root, "gin/x.gin", {"a": [["preset", "base"]], "b": [["preset", "file"]], "c": [["preset", "base"]]})
    for name, seed, value in (("a", 0, 0.5), ("b", 0, 0.7), ("c", 1, 0.6)):
        table = {"title": "t", "columns": ["", "score"], "rows": [["all", value]]}
        make(root, name, effective(0.3, seed), {"m": value}, tables=[table], rows=[{"step": 1, "loss": value}])
    runs = gather.collect([str(root)])
    (group,) = gather.settings(runs)
    assert group.label == "base = file"
    tables = {t.key.partition("-")[0]: t for s in report.build(runs) for t in s.tables}
    assert tables["summary"].rows == [["base = file", "2", "0.5500 ± 0.0707"]]
    assert tables["run"].rows == [["all", "0.5500 ± 0.0707"]]


def test_files_of_one_name_are_told_apart_by_as_much_of_their_path_as_it_takes(tmp_path):
    for place, config, ratio in (
        ("a", "gin/sam/nyu_s.gin", 0.3), ("b", "gin/sam/dformer/nyu_s.gin", 0.3), ("c", "gin/sam/dformer/nyu_b.gin", 0.5),
        ("d", "theirs:base.gin", 0.6), ("e", "mine:base.gin", 0.7), ("f", "mine:base.gin", 0.8),
    ):  # fmt: skip
        make(tmp_path / place, "r", {**effective(ratio, 0), "x.Y.z": place}, {"m": ratio}, config=config)
    labels = [g.label for g in gather.groups(gather.collect([str(tmp_path)]))]
    assert labels == sorted([
        "sam/nyu_s", "dformer/nyu_s", "nyu_b", "theirs/base", "mine/base  sparse_ratio = 0.7, z = e", "mine/base  sparse_ratio = 0.8, z = f",
    ])  # fmt: skip
    for place in ("one", "two"):  # runs that say nothing of what was asked
        make(tmp_path / place / "old", "r", {}, {"m": 0.1})
    blank = gather.groups(gather.collect([str(tmp_path / "one"), str(tmp_path / "two")]))
    assert [g.label for g in blank] == [f"x [{tmp_path / place / 'old' / 'r'}]" for place in ("one", "two")]


def test_runs_without_a_metric_in_common_have_tables_of_their_own(tmp_path):
    for task, ratio, metrics in (
        ("seg", 1, {"mIoU": 0.2, "loss": 1.0}), ("seg", 2, {"mIoU": 0.3}), ("reid", 1, {"mAP": 0.4, "rank-1": 0.5}), ("reid", 2, None),
    ):  # fmt: skip
        make(
            tmp_path,
            f"{task}{ratio}",
            {f"{task}.X.y": str(ratio)},
            metrics,
            config=f"gin/{task}.gin",
            rows=[{"step": s, "loss": 2.0} for s in (1, 2)],
        )
    page = report.build(gather.collect([str(tmp_path)]))
    found = {t.key: t for s in page for t in s.tables}
    assert found["summary"].columns == ["configuration", "runs", "mAP", "rank-1"]
    assert found["summary"].rows == [["reid  y = 1", "1", "0.4000", "0.5000"], ["reid  y = 2", "1", "– (0 of 1)", "– (0 of 1)"]]
    assert found["summary"].best == set()  # the best of one
    assert found["summary-2"].rows == [["seg  y = 1", "1", "0.2000", "1.0000"], ["seg  y = 2", "1", "0.3000", "– (0 of 1)"]]
    assert found["summary-2"].best == {1}
    assert [row[:2] for row in found["significance"].rows] == [["seg  y = 1", "-0.1000"]]
    (curves,) = [s for s in page if s.id == "curves"]
    assert sorted(f.caption for f in curves.figures if f.caption.startswith("loss over steps (")) == [
        "loss over steps (reid  y = 1, reid  y = 2)",
        "loss over steps (seg  y = 1, seg  y = 2)",
    ]


def test_what_is_small_is_not_printed_as_nothing():
    assert [report._digits(v, 4) for v in (34.209, 0.0, 0.0123, 5.76e-07)] == ["34.2090", "0.0000", "0.0123", "5.76e-07"]
    assert [report._digits(v, 1) for v in (1.6, 1.0, 272 / 2**20)] == ["1.6", "1.0", "0.000259"]


def test_all_that_tie_are_marked_and_a_baseline_can_be_named(tmp_path):
    root = tmp_path / "runs"
    for ratio, values in ((0.3, (0.4, 0.6)), (0.5, (0.6, 0.4)), (0.7, (0.1, 0.2))):
        for seed, value in enumerate(values):
            make(root, f"r{ratio}-{seed}", effective(ratio, seed), {"m": value})
    page = report.build(gather.collect([str(root)]), baseline="sparse_ratio = 0.7")
    found = {t.key: t for s in page for t in s.tables}
    assert found["summary"].best == {0, 1}
    assert "(a tie)" in found["summary"].note
    assert [row[0] for row in found["significance"].rows] == ["sparse_ratio = 0.3", "sparse_ratio = 0.5"]
    assert [row[1] for row in found["significance"].rows] == ["+0.3500", "+0.3500"]
    with pytest.raises(ValueError, match="no configuration is named 'x'"):
        report.build(gather.collect([str(root)]), baseline="x")


def test_losses_are_best_where_they_are_smallest(sweep):
    groups = gather.groups(gather.collect([str(sweep)]))
    for group in groups:
        for run in group.runs:
            run.metrics["final/loss"] = 1 - run.metrics["mAP[camera]"]
    assert gather.best(groups, "final/loss") == gather.best(groups, "mAP[camera]") == [groups[1]]


def test_holm_by_hand():
    assert gather.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert gather.holm([0.9, 0.8]) == [1.0, 1.0]
    assert gather.holm([]) == []


def test_own_tables_are_means_over_seeds(tmp_path):
    root = tmp_path / "runs"
    for seed, value in enumerate((0.5, 0.7)):
        table = {"title": "t", "columns": ["", "score", "classes"], "rows": [["all", value, 7], ["none", None, 7]]}
        make(root, f"r{seed}", effective(0.3, seed), {"m": value}, tables=[table])
    (section,) = [s for s in report.build(gather.collect([str(root)])) if s.id == "runs"]
    assert section.tables[0].rows == [["all", "0.6000 ± 0.1414", "7"], ["none", "–", "7"]]


def test_the_published_number_stands_beside_ours_with_its_tolerance(tmp_path):
    from core import claims
    from repro import claims as ledger

    config, root = "gin/sdtps/rgbnt201_stable_fork.gin", tmp_path / "runs"
    number = next(n for n in claims.published_of("sdtps") if n.config == config and n.metric == "mAP[camera]")
    for seed, off in enumerate((0.004, 0.006)):
        asked = {**ledger.requested(config), "trainer.train.seed": str(seed)}
        folder = make(root, f"r{seed}", asked, {number.metric: number.value + off}, config=config)
        info = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**info, "plugins": {"sdtps": {}}}))
    (table,) = [t for s in report.build(gather.collect([str(root)])) for t in s.tables if t.key == "ledger"]
    row = next(r for r in table.rows if r[0] == number.id)
    assert row[1:6] == [
        number.metric,
        f"{number.value:g} ± {number.tolerance:g}",
        f"{number.value + 0.005:.4f} ± 0.0014 (n=2)",
        "+0.0050",
        "reproduced",
    ]
    (folder / "data.json").write_text(json.dumps({"name": "toy", "sample": True}))
    (section,) = [s for s in report.build(gather.collect([str(root)])) if s.id == "published"]
    assert any(p.startswith("1 of the runs does not count: a generated sample") for p in section.paragraphs)


def test_one_run_shows_its_loss_terms_even_if_its_log_begins_with_an_evaluation(tmp_path):
    rows = [{"step": 0, "eval": {"m": 0.1}}]
    rows += [{"step": s, "loss": 3.0 / s, "loss/a": 1.0 / s, "loss/b": 2.0 / s, "lr": 0.1} for s in range(1, 5)]
    make(tmp_path / "runs", "r", {}, {"m": 0.5}, rows=[*rows, {"step": 4, "eval": {"m": 0.5}}])
    (section,) = [s for s in report.build(gather.collect([str(tmp_path / "runs")])) if s.id == "curves"]
    assert [f.caption for f in section.figures] == [f"{what} over steps" for what in ("loss", "loss terms", "evaluation", "lr")]


def test_evaluations_and_training_steps_of_one_name_are_two_curves(tmp_path):
    rows = [row for s in range(1, 4) for row in ({"step": s, "loss": 1.0, "accuracy": 0.9}, {"step": s, "eval": {"accuracy": 0.1}})]
    run = gather.read(make(tmp_path / "runs", "r", {}, {"accuracy": 0.1}, rows=rows))
    assert report._series(run, "accuracy") == [(s, 0.9) for s in range(1, 4)]
    assert report._series(run, "accuracy", evaluated=True) == [(s, 0.1) for s in range(1, 4)]


def test_no_profile_is_said(tmp_path):
    make(tmp_path / "runs", "r", {}, {"m": 0.1})
    (section,) = [s for s in report.build(gather.collect([str(tmp_path / "runs")])) if s.id == "cost"]
    assert section.paragraphs[0].startswith("– (no run has a profile")


def test_smoothing_is_a_mean_of_the_last_points_and_bands_keep_common_steps():
    assert report._smoothed([(1, 1.0), (2, 3.0), (3, 8.0)], 2) == [(2, 2.0), (3, 5.5)]
    assert report._band([[(1, 1.0), (2, 2.0)], [(2, 4.0), (3, 1.0)]]) == ([2], [3.0], [2.0], [4.0])


def test_compression_says_both_ratios_and_what_was_not_measured(tmp_path):
    from torch import nn, randn

    from core.profile import TokenReport, compression, profile

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x[:, :2])

        def token_report(self):
            return TokenReport([("patches", 4), ("kept", 2)], class_tokens=1)

    x = (randn(1, 4, 3),)
    before, after = (profile(m, x, timed=False) for m in (nn.Linear(3, 3), Halved(3, 3)))
    found = {"model": after.to_dict(), "compression": compression(before, after).to_dict()}
    folder = make(tmp_path / "runs", "r", {}, {"m": 1.0})
    (folder / "profile.json").write_text(json.dumps(found))
    (section,) = [s for s in report.build(gather.collect([str(tmp_path / "runs")])) if s.id == "cost"]
    tables = {t.key: t for t in section.tables}
    said = {row[1]: row[2:4] for row in tables["tokens"].rows}
    assert said["kept"] == ["2", "50.0%"]
    assert next(v for k, v in said.items() if k.startswith("ratio without")) == ["2", "50.0%"]
    assert next(v for k, v in said.items() if k.startswith("ratio with class token (60.0% with 1 on both sides, 75.0%")) == [
        "3",
        "60.0%",
    ]
    assert "one input" in tables["tokens"].note
    assert tables["compression"].rows[0] == ["MACs, network", "36", "18", "0.5000"]
    assert [row[4] for row in tables["modules"].rows] == ["100.0%"]


def test_page_markdown_and_csv_hold_the_same_numbers(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["report", str(sweep), "--out", str(out)]) == 0
    page, text = (out / "index.html").read_text(), (out / "tables.md").read_text()
    with open(out / "summary.csv") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["configuration", "runs", "mAP[camera]"]
    for cell in (c for row in rows[1:] for c in row):
        assert cell in page
        assert cell in text
    assert '<tr class="best"><td>sparse_ratio = 0.5</td>' in page
    assert "0.7900" in page
    assert "-0.2800" in page
    assert "significance" in page
    assert page.count("data:image/svg+xml;base64,") >= 1


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("src", "href") and v]
        assert tag != "script"


def test_the_page_fetches_nothing_and_escapes_everything(tmp_path):
    evil = "<script>alert(1)</script>"
    table = {"title": evil, "columns": [evil, "b"], "rows": [[evil, 1]], "note": evil}
    make(tmp_path / "runs", "a", {"x.y": evil}, {evil: 1.0}, tables=[table], message=evil, sample=True)
    out = tmp_path / "out"
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(out), "--title", evil]) == 0
    page = (out / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert {link[1:] for link in links.found if link[0] == "#"} <= set(re.findall(r'<section id="(\w+)">', page))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Generated sample." in page


def test_two_runs_are_compared_in_what_was_asked_where_they_ran_results_and_cost(tmp_path, capsys):
    root = tmp_path / "runs"
    planned(root, "gin/x.gin", {"b": [["preset", "half"], ["SEED", "0"]]})
    a = make(root, "a", effective(0.3, 0), {"m": 0.25, "only a": 1.0})
    b = make(root, "b", effective(0.5, 0), {"m": 0.5})
    (b / "data.json").write_text(json.dumps({"name": "other"}))
    (b / "profile.json").write_text(json.dumps({"model": {"macs": 1234, "parameters": 7}}))
    assert cli.main(["compare", str(a), str(b)]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "parameter a b (half)",
        "sdtps.TokenSparse.sparse_ratio 0.3 0.5",
        "m 0.2500 0.5000 0.2500",
        "only a 1.0000 – –",
        "data toy other",
        "MACs – 1,234 –",
    ):
        assert line in said
    assert not any(line.startswith("commit") for line in said)  # both ran the same
    assert cli.main(["compare", str(root), str(b)]) == 2
    assert "holds 2 runs" in capsys.readouterr().err


def test_bad_requests_are_one_line(tmp_path, sweep, capsys):
    (tmp_path / "void").mkdir()
    (tmp_path / "cut.json").write_text('{"claims": [')
    (tmp_path / "other.json").write_text('{"rows": [], "golden": []}')
    (tmp_path / "short.json").write_text('{"claims": [{"id": "C"}]}')
    told = ["report", str(sweep), "--out", str(tmp_path / "out"), "--claims"]
    for words, said in (
        (["report", str(tmp_path / "nowhere")], "is not a folder"),
        (["report", str(tmp_path / "void")], "no run folder"),
        (["compare", str(sweep / "r0.3-0"), str(sweep / "r0.3-0")], "the same run"),
        (["report", str(sweep), "--metric", "mAP"], "no run has a metric 'mAP'"),
        ([*told, "nowhere.json"], "nowhere.json is no outcome of `repro verify --json`: there is no such file"),
        ([*told, str(tmp_path / "cut.json")], "cut.json is no outcome of `repro verify --json`"),
        ([*told, str(tmp_path / "other.json")], "other.json is no outcome of `repro verify --json`"),
        ([*told, str(tmp_path / "short.json")], "'claims' must be a list of entries with id, measured, plugin"),
    ):
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err


def test_a_folder_without_anything_is_a_gap_and_not_a_crash(tmp_path):
    empty = tmp_path / "runs" / "empty"
    empty.mkdir(parents=True)
    (empty / "config.gin").write_text("")
    out = tmp_path / "out"
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert "no status" in (out / "index.html").read_text()


def test_rows_of_a_log_that_are_none_are_gaps(tmp_path):
    odd = [{"eval": 4}, {"step": 1, "eval": 4}, {"step": "two", "loss": 1.0}, {"loss": 3.0}]
    rows = [{"step": s, "loss": 1.0 / s} for s in (1, 2, 3)]
    make(tmp_path / "runs", "one", effective(0.5, 0), metrics={"mAP[camera]": 0.5}, rows=[*odd, *rows])
    assert gather.read(tmp_path / "runs" / "one").rows == rows
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0


def test_ten_thousand_folders_are_read_without_their_logs(tmp_path):
    """Not a timing: the work per folder must not include its metrics.jsonl, except for the configurations drawn."""
    root = tmp_path / "runs"
    for i in range(60):
        make(root, f"r{i:04d}", {"a.b": str(i), "trainer.train.seed": "0"}, {"m": float(i)}, rows=[{"step": 1, "loss": 1.0}])
    runs = gather.collect([str(root)])
    report.build(runs)
    assert sum("rows" in vars(r) for r in runs) <= report.CURVE_GROUPS


# What the browser itself says: of each figure whether it loaded and is drawn, whether the page is wider than the screen, its colour.
PROBE = """<script>addEventListener("load", () => {
    document.querySelectorAll("details").forEach(d => d.open = true);
    const seen = [...document.images].map(i => i.complete && i.naturalWidth > 50 && i.getBoundingClientRect().width > 50);
    const root = document.documentElement;
    const said = {seen, over: root.scrollWidth > root.clientWidth, width: innerWidth, ground: getComputedStyle(document.body).backgroundColor};
    parent.postMessage(JSON.stringify(said), "*");
})</script></body>"""
# The browser's own window is never narrower than 500 pixels, so a phone is a frame.
PHONE = """<title></title><script>onmessage = e => { document.title = e.data }</script>
<iframe src="probe.html" style="width:390px;height:844px;border:0"></iframe>"""


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="headless Chromium is not installed")
@pytest.mark.parametrize(("scheme", "ground"), [(0, "rgb(20, 24, 28)"), (1, "rgb(255, 255, 255)")], ids=["dark", "light"])
def test_the_page_opens_on_a_phone_without_an_error_and_every_figure_is_drawn(sweep, tmp_path, scheme, ground):
    from PIL import Image

    (sweep / "r0.3-0" / "pictures").mkdir()
    Image.new("RGB", (1400, 300), "red").save(sweep / "r0.3-0" / "pictures" / "wide.png")
    (sweep / "r0.3-0" / "diff.patch").write_text("+" + "long " * 200)
    claim = {
        "plugin": "p",
        "id": "C",
        "statement": "word " * 40,
        "verdict": "holds",
        "measured": "x" * 300,
        "why": "",
        "source": "s",
    }
    (tmp_path / "verify.json").write_text(json.dumps({"claims": [claim]}))
    out = tmp_path / "out"
    cli.main(["report", str(sweep), "--out", str(out), "--claims", str(tmp_path / "verify.json")])
    page = (out / "index.html").read_text()
    (out / "probe.html").write_text(page.replace("</body>", PROBE))
    (out / "phone.html").write_text(PHONE)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
        f"--blink-settings=preferredColorScheme={scheme}", "--window-size=600,900", "--virtual-time-budget=5000", "--dump-dom",
        f"file://{out / 'phone.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[-500:]
    said = json.loads(title.group(1))
    assert said["seen"] == [True] * page.count("<img ")
    assert len(said["seen"]) == 2  # the loss and the picture
    assert said["width"] == 390
    assert not said["over"]  # nothing sticks out; wide tables scroll inside their own box
    assert said["ground"] == ground


def test_a_seed_that_was_run_twice_counts_once_and_it_is_said(tmp_path):
    for name, value in (("one", 0.5), ("two", 0.7)):
        make(tmp_path / name, "r", effective(0.5, 0), {"m": value})
    make(tmp_path / "three", "r", effective(0.5, 1), {"m": 0.6})
    runs = gather.collect([str(tmp_path)])
    (group,) = gather.groups(runs)
    spread = gather.spread(group, "m")
    assert (spread.n, spread.missing) == (2, 0)
    assert spread.mean == pytest.approx(0.55)
    page = report.markdown(report.build(runs), "t")
    assert "seed 0 was run more than once, with DIFFERENT results; it counts once" in page


def test_what_runs_select_by_says_which_way_is_better(tmp_path):
    for ratio, value in ((0.3, 0.3), (0.5, 0.5)):
        asked = {**effective(ratio, 0), gather.SELECT_KEY: "'score'", gather.MODE_KEY: "'min'"}
        make(tmp_path, f"r{ratio}", asked, {"score": value, "rmse": value, "mAP": value})
    groups = gather.groups(gather.collect([str(tmp_path)]))
    for metric, smallest in (("score", True), ("rmse", True), ("mAP", False)):
        (top,) = gather.best(groups, metric)
        assert (gather.spread(top, metric).mean == 0.3) == smallest, metric


@pytest.mark.parametrize(
    "metric", ["presence NLL", "presence ECE", "loss/class", "FPR@95", "val_loss", "abs_rel", "leak[raw]", "false positives"]
)
def test_what_falls_by_its_name(metric):
    assert gather.lower_is_better(metric)
    assert not gather.lower_is_better("fidelity of cerise maelstroms, mIoU[zero], rank-1")


def test_every_table_has_a_file_of_its_own_however_long_the_names_are(tmp_path):
    long = "x" * 120
    planned(tmp_path, "gin/x.gin", {"a": [["preset", long + "1"]], "b": [["preset", long + "2"]]})
    for name, ratio in (("a", 0.3), ("b", 0.5)):
        make(tmp_path, name, effective(ratio, 0), {"m": 1.0}, tables=[{"title": "t", "columns": ["a"], "rows": [[1]], "note": ""}])
    page = report.build(gather.collect([str(tmp_path)]))
    keys = [table.key for section in page for table in section.tables]
    assert len(keys) == len(set(keys))
    assert sum(key.startswith("run-") for key in keys) == 2


@pytest.mark.parametrize(
    ("file", "entry", "value"),
    [
        ("run", "source", None), ("run", "environment", {"versions": {"torch": None}}), ("run", "plugins", {"sdtps": None}),
        ("run", "command", None), ("run", "effective", {"a.b": ["1"], "trainer.train.seed": "0"}), ("status", "state", []),
        ("result", "metrics", {"m": "0.5"}), ("result", "tables", [{"title": 3}, None]), ("result", "expected", []),
    ],
)  # fmt: skip
def test_an_entry_of_another_form_is_a_gap_and_the_page_is_made(tmp_path, file, entry, value):
    make(tmp_path, "r", effective(0.5, 0), {"m": 0.5})
    path = tmp_path / "r" / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    runs = gather.collect([str(tmp_path)])
    assert "<html" in report.render(report.build(runs), runs, "t", "c")
    make(tmp_path, "other", effective(0.7, 0), {"m": 0.5})
    from repro import compare

    assert compare.main(argparse.Namespace(first=str(tmp_path / "r"), second=str(tmp_path / "other"))) == 0
