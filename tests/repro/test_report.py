"""Reports are made from run folders alone: gaps stay gaps, n is stated, everything is escaped, and the page works offline."""

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
    assert all(link.startswith("data:") for link in links.found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Generated sample." in page


def test_bad_requests_are_one_line(tmp_path, sweep, capsys):
    (tmp_path / "void").mkdir()
    for words, said in (
        (["report", str(tmp_path / "nowhere")], "is not a folder"),
        (["report", str(tmp_path / "void")], "no run folder"),
        (["compare", str(sweep / "r0.3-0"), str(sweep / "r0.3-0")], "the same run"),
        (["report", str(sweep), "--metric", "mAP"], "no run has a metric 'mAP'"),
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


def test_ten_thousand_folders_are_read_without_their_logs(tmp_path):
    """Not a timing: the work per folder must not include its metrics.jsonl, except for the configurations drawn."""
    root = tmp_path / "runs"
    for i in range(60):
        make(root, f"r{i:04d}", {"a.b": str(i), "trainer.train.seed": "0"}, {"m": float(i)}, rows=[{"step": 1, "loss": 1.0}])
    runs = gather.collect([str(root)])
    report.build(runs)
    assert sum("rows" in vars(r) for r in runs) <= report.CURVE_GROUPS


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="headless Chromium is not installed")
def test_the_page_opens_in_chromium_without_an_error_and_every_figure_is_drawn(sweep, tmp_path):
    out = tmp_path / "out"
    cli.main(["report", str(sweep), "--out", str(out)])
    page = (out / "index.html").read_text()
    # What the browser itself says of each figure: loaded, and of which size.
    probe = "<script>addEventListener('load',()=>{document.title='SEEN '+[...document.images].map(i=>i.complete&&i.naturalWidth>50&&i.getBoundingClientRect().width>50).join(',')+' OVER '+(document.documentElement.scrollWidth>innerWidth)})</script>"
    (out / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
        "--window-size=400,900", "--virtual-time-budget=5000", "--dump-dom", f"file://{out / 'probe.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>SEEN (.*?) OVER (.*?)</title>", done.stdout)
    assert title, done.stdout[-500:]
    seen = title.group(1).split(",")
    assert len(seen) == page.count("<img ")
    assert set(seen) == {"true"}
    assert title.group(2) == "false"  # nothing sticks out on a phone's width; wide tables scroll inside their own box
