"""The page works without a network, in a real browser, and with any names of layers."""

import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from altgrad.report import (
    Confirmation,
    Row,
    Run,
    RunReport,
    confirmation_page,
    list_next_lines,
    page,
    read,
    write_answer,
)
from tests.chromium import chromium, needs_chromium
from tests.report.confirming import make_twin_run, share
from tests.report.runs import MARKUP, SCRIPT, figures, make_run, write_run
from tests.report.shown_runs import record_bf16, record_fp32
from tests.report.twin_runs import figures as twin_figures, make_recipe

NAN = float("nan")

ACT = """
<script>
const result = {};
const rows = () => [...document.getElementById("verdicts").tBodies[0].rows];
const shown = () => rows().filter((row) => row.offsetParent !== null);
const names = () => shown().map((row) => row.cells[0].textContent);
const box = document.querySelector("input[data-table=verdicts]");
const visible = (selector) => {
  const place = document.querySelector(selector).getBoundingClientRect();
  return place.width > 100 && place.height > 20;
};
result.visible = [".altgrad-runs", ".altgrad-actions", "#verdicts", "#picture-kept",
  "#picture-steps", "#picture-ranges", "#picture-stalls-0"].filter(visible);
result.all = names();
box.value = "MAT"; box.dispatchEvent(new Event("input"));
result.found = names();
box.value = ""; box.dispatchEvent(new Event("input"));
const heading = document.querySelectorAll("#verdicts th")[1];
heading.click(); result.ascending = names();
heading.click(); result.descending = names();
document.querySelector("#verdicts th").click(); result.by_name = names();
result.wider = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.innerHTML = "<pre id=result></pre>";
document.getElementById("result").textContent = JSON.stringify(result);
</script>
"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(RunReport.from_run(read(write_run(tmp_path_factory.mktemp("run")))))


def test_the_page_loads_nothing_from_a_network(html: str) -> None:
    found = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(([^)]*)\)""", html)
    addresses = {"".join(address) for address in found}
    assert {"data:,", *re.findall(r"#kept-\w+", html)} <= addresses  # the pattern finds addresses
    for address in addresses:
        assert address.startswith(("#", "data:")), address
    assert "@import" not in html
    assert "fetch(" not in html


def test_names_are_escaped_everywhere(html: str) -> None:
    assert SCRIPT not in html
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 3
    assert html.count("<script>") == 1
    assert html.count(MARKUP) >= 3


def test_the_pictures_are_svg_with_text(html: str) -> None:
    pictures = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(pictures) == 5
    texts = " ".join(text for picture in pictures for text in picture.itertext())
    for word in ("matrix", "frozen", "stall_frac in e5m2", "% too small to move a weight"):
        assert word in texts, word
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert {"verdicts", "picture-kept"} <= {*ids}
    assert len(ids) == len(set(ids))


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    report = RunReport.from_run(read(write_run(tmp_path)))
    assert page(report) == page(report)


def test_verdicts_and_reasons_are_readable_without_scripts(html: str) -> None:
    without = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert without.count('class="FROZEN"') >= 8
    assert "of the weights that float32 moved would never have moved" in without
    assert re.search("<h1>.*Not fine|<h1>.*Fine", without)
    assert (
        without.index('class="altgrad-runs"')
        < without.index('class="altgrad-actions"')
        < without.index('id="verdicts"')
    )


def test_layers_with_elements_that_are_not_finite_are_marked(html: str) -> None:
    assert "NaN or inf" not in html
    broken = figures(kept_update_ratio=0.38) | {"nonfinite_frac": 0.5}
    run = make_run([Row(0, "broken", broken, {}), Row(0, "whole", figures(), {})], ["bf16"])
    marked = page(RunReport.from_run(run))
    assert "0.38*!</td>" in marked
    assert "(* of single updates, ! some NaN)" in marked
    assert (
        "<b>NaN</b> elements were NaN or inf in an observed step: no figure counts these" in marked
    )
    assert "broken (50 %)" in marked
    assert "50 % of the elements were NaN or inf in a step, which no figure counts" in marked


def test_the_page_explains_intervals_of_real_runs_and_shares_of_single_updates() -> None:
    twin = replace(make_run([Row(0, "a", twin_figures(), {})], []), recipes={"bf16": make_recipe()})
    step = make_run([Row(0, "a", figures(kept_update_ratio=0.985), {})], ["bf16"])
    by_twins, by_steps = (page(RunReport.from_run(run)) for run in (twin, step))
    for text in (
        "progress kept (80&nbsp;% of real runs)</th>",
        "In brackets: what 80 % of those",
    ):
        assert (text in by_twins, text in by_steps) == (True, False)
    assert '<b class="WATCH">watch*</b> 0.5 to 0.99 of single updates' in by_steps
    assert "0.98*</td>" in by_steps
    assert "smallest fine" in by_steps
    assert "smallest fine" not in by_twins  # no format was judged


@needs_chromium
def test_search_and_sort_work_in_a_browser_without_errors(html: str, tmp_path: Path) -> None:
    result = act(html.replace("</body>", f"{ACT}</body>"), tmp_path)
    assert result["visible"] == [
        *(".altgrad-runs", ".altgrad-actions", "#verdicts", "#picture-kept", "#picture-steps"),
        *("#picture-ranges", "#picture-stalls-0"),
    ]
    assert {*result["all"]} == {"gain", SCRIPT, "matrix", MARKUP}
    assert result["found"] == ["matrix"]
    assert {*result["ascending"][:2]} == {*result["descending"][2:]} == {"gain", SCRIPT}
    assert result["by_name"] == sorted(result["by_name"], key=result["by_name"].index)
    assert [n for n in result["by_name"] if n in ("gain", "matrix")] == ["gain", "matrix"]
    assert not result["wider"]


@needs_chromium
def test_verdicts_are_in_sight_beside_the_longest_name(tmp_path: Path) -> None:
    rows = [Row(0, "encoder." * 25 + "weight", figures(), {})]
    html = page(RunReport.from_run(make_run(rows, ["bf16"])))
    look = """
    <script>
    const cell = document.querySelector("#verdicts td.STORES_FINE").getBoundingClientRect();
    const box = document.querySelector(".scroll").getBoundingClientRect();
    document.body.innerHTML = "<pre id=result></pre>";
    const fits = cell.right < box.right;
    document.getElementById("result").textContent = JSON.stringify({ fits });
    </script>
    """
    assert act(html.replace("</body>", f"{look}</body>"), tmp_path) == {"fits": True}


def test_reasons_are_those_of_the_first_200_layers() -> None:
    rows = [Row(0, f"layer.{k}", figures(), {}) for k in range(201)]
    html = page(RunReport.from_run(make_run(rows, ["bf16"])))
    assert "The first 200 of 201 layers; --json and --csv have the reasons of all." in html
    table, reasons = html.split('id="verdicts"')[1].split('id="reasons"')
    assert (table.count('td class="layer"'), reasons.count('td class="layer"')) == (201, 200)
    whole = page(RunReport.from_run(make_run(rows[:200], ["bf16"])))
    assert "have the reasons of all" not in whole


def test_a_layer_without_a_verdict_gets_no_advice() -> None:
    nothing = figures(kept_update_ratio=NAN, stall_frac=NAN, never_moved_frac=NAN)
    run = make_run([Row(0, "a", nothing | {"nonfinite_frac": 1.0}, {})], ["bf16"])
    html = page(RunReport.from_run(run))
    assert '<td data-label="smallest fine">not judged</td>' in html


SEE = """
<script>
const place = (selector) => document.querySelector(selector).getBoundingClientRect();
const cells = [...document.querySelectorAll(".altgrad-runs th, .altgrad-runs td, #verdicts td")];
const result = {
  runs: place(".altgrad-runs").bottom, actions: place(".altgrad-actions").top,
  layers: place("#verdicts").top,
  width: document.documentElement.clientWidth,
  wider: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  cut: cells.filter((cell) => cell.scrollWidth > cell.clientWidth + 1).length,
  heading: document.querySelector("h1").textContent,
};
document.body.innerHTML = "<pre id=result></pre>";
document.getElementById("result").textContent = JSON.stringify(result);
</script>
"""


@needs_chromium
@pytest.mark.parametrize("width", [390, 1000, 1400])
@pytest.mark.parametrize("make", [record_fp32, record_bf16])
def test_the_first_screen_has_the_answer_the_recipes_and_what_to_do(
    make: Callable[[Path], Run], width: int, tmp_path: Path
) -> None:
    found = RunReport.from_run(make(tmp_path / "run"))
    html = page(found).replace("</body>", f"{SEE}</body>")
    seen = act(html, tmp_path, f"--window-size={width},800")
    assert seen["width"] <= max(width, 500)  # some browsers have no narrower window
    assert seen["runs"] < seen["actions"] < 800
    assert seen["actions"] < seen["layers"]
    assert not seen["wider"]
    assert seen["cut"] == 0
    assert seen["heading"] == write_answer(found.assessment.runs)


@needs_chromium
def test_a_script_error_on_the_page_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="on purpose"):
        act("<body><script>throw new Error('on purpose')</script></body>", tmp_path)


def act(html: str, folder: Path, *options: str) -> dict[str, Any]:
    """Open a page in a browser and return the result of the script that was added to it."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    dom, errors = chromium(folder, path.as_uri(), "--dump-dom", *options)
    assert not errors
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-500:]
    return json.loads(unescape(found[1]))


def test_any_page_can_be_written_as_utf_8(tmp_path: Path) -> None:
    report = RunReport.from_run(read(write_run(tmp_path, ["a\ud800\x1b[31m"], ["b\udcffx"])))
    path = Path(os.fsdecode(b"/caf\xe9/altgrad.jsonl"))  # a name that is no UTF-8
    html = page(replace(report, run=replace(report.run, path=path, notes=[f"{path}: \x9b"])))
    assert html.encode().decode() == html
    assert all(line.isprintable() for line in html.split("\n"))
    for text in ("caf�/altgrad.jsonl", "a��[31m", "b�x", "altgrad.jsonl: �"):
        assert text in html


# --- what one run predicted

LOOK = """
<script>
const result = {};
const names = () => [...document.getElementById("layers").tBodies[0].rows]
  .filter((row) => row.offsetParent !== null).map((row) => row.cells[0].textContent);
const visible = (id) => {
  const place = document.getElementById(id).getBoundingClientRect();
  return place.width > 100 && place.height > 20;
};
result.visible = ["summary", "picture-agreement", "layers"].filter(visible);
result.all = names();
const headings = document.querySelectorAll("#layers th");
headings[1].click(); result.by_predicted = names();
headings[0].click(); result.by_name = names();
const box = document.querySelector("input[data-table=layers]");
box.value = "GAI"; box.dispatchEvent(new Event("input"));
result.found = names();
result.wider = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.innerHTML = "<pre id=result></pre>";
document.getElementById("result").textContent = JSON.stringify(result);
</script>
"""


def make_confirmation_page() -> str:
    ends = {"gain": (1.0, 1.0), SCRIPT: (0.75, 0.25), MARKUP: (0.5, 0.5), "none": (NAN, 0.5)}
    runs = [
        make_twin_run(
            {name: share(each[k], 0.5, exp_avg_sq_ratio=1.0) for name, each in ends.items()}
            | {None: share(0.625, 0.5)},
            recipe,
            letter=letter,
        )
        for k, (recipe, letter) in enumerate([("bf16-true", SCRIPT), ("now", "b\x9b")])
    ]
    return confirmation_page(Confirmation(*runs, "bf16-true"))


def test_the_page_of_a_prediction_has_each_layer_and_its_picture() -> None:
    html = make_confirmation_page()
    assert "<title>AltGrad: bf16-true, predicted and real</title>" in html
    (picture,) = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert {"predicted by A", "real in B"} <= {*ET.fromstring(picture).itertext()}
    table = html[html.index('<table id="layers">') : html.index("</table>")]
    assert re.findall(r'<td class="FROZEN" data-value="([^"]*)"', table) == ["1.0", "1.0"]
    rows = re.findall(r"<tr><td.*?</tr>", table, re.DOTALL)
    assert [re.findall(r'data-value="([^"]*)"', row)[:3] for row in rows] == [
        ["0.75", "0.25", "0.5"],
        ["0.5", "0.5", "0.0"],
        ["1.0", "1.0", "0.0"],
        ["nan", "0.5", "nan"],
        ["0.625", "0.625", "0.0"],
    ]
    assert "<b>the model</b>" in rows[-1]
    assert "Real: B itself, which is stored so." in html


def test_the_page_of_a_prediction_escapes_names_and_loads_nothing() -> None:
    html = make_confirmation_page()
    assert html.count("<script>") == 1
    assert SCRIPT not in html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert MARKUP in html
    assert all(line.isprintable() for line in html.split("\n"))
    found = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(([^)]*)\)""", html)
    for address in {"".join(each) for each in found}:
        assert address.startswith(("#", "data:")), address
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert html == make_confirmation_page()


@needs_chromium
def test_the_page_of_a_prediction_can_be_searched_and_sorted(tmp_path: Path) -> None:
    result = act(make_confirmation_page().replace("</body>", f"{LOOK}</body>"), tmp_path)
    assert result["visible"] == ["summary", "picture-agreement", "layers"]
    assert result["all"] == [SCRIPT, MARKUP, "gain", "none"]
    assert result["by_predicted"] == [MARKUP, SCRIPT, "gain", "none"]
    assert {*result["by_name"]} == {*result["all"]}
    assert result["found"] == ["gain"]
    assert not result["wider"]


def test_the_page_has_all_next_lines(run: Path) -> None:
    report = RunReport.from_run(read(run))
    html = unescape(page(report))
    lines = list_next_lines(report)
    assert len({line.recipe for line in lines}) > 0
    for line in lines:
        assert line.code in html
        assert f"<h3>{line.why}</h3>" in html
    assert html.count("<h3>") == len({line.recipe for line in lines})
