"""The page of an experiment: whole without a network, readable by a parser and in a browser, in light and in dark."""

import base64
import re
import shutil
import struct
import subprocess

import pytest

from misa_engine.bench.reproduce import results
from misa_engine.bench.reproduce.experiments import EXPERIMENTS, runs_of
from misa_engine.bench.reproduce.page import number, page_of
from pages import Page
from reproducing import fake

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'misa_engine[bench]'")
pytestmark = pytest.mark.filterwarnings("ignore")
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def whole(name, scale="paper", **metrics):
    """An experiment's document with numbers of nobody."""
    runs = runs_of(name, "llama3-8b" if name == "math" else "", scale)
    every = {metric: 70.0 for metric in EXPERIMENTS[name].metrics if metric in results.HIGHER}
    rows = [fake(run, **{**every, "heldout_loss": 2.0 + run.seed, "perplexity": 9.0, "seconds": 7.0, **metrics})
            for run in runs]  # fmt: skip
    rows[-1]["status"] = "failed: <RuntimeError> & more"
    return results.document_of(name, scale, "official", "cpu", runs, rows)


@pytest.fixture(scope="module")
def math_page():
    return page_of(whole("math"))


@pytest.mark.parametrize("name", ("math", "c4-130m", "figure-3"))
def test_the_page_loads_nothing_from_anywhere(name):
    page = Page(page_of(whole(name, "tiny")))
    assert page.open == [] and len(page.loads) == 1
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    picture = base64.b64decode(page.loads[0].partition(",")[2]).decode()
    drawn = re.sub(r"<(metadata|!DOCTYPE|\?xml).*?(</metadata>|>)", "", picture, flags=re.DOTALL)
    assert not re.findall(r'(?:href|src)="(?!#)[^"]*"|url\((?!#)', drawn) and "<path" in drawn


@pytest.mark.parametrize("foreign", ('<img src="https://a.b/c.png">', '<script src="x.js"></script>',
    '<link rel="stylesheet" href="https://a.b/c.css">', '<p style="background: url(https://a.b/c)"></p>'))  # fmt: skip
def test_the_parser_of_these_tests_sees_what_a_browser_would_load(foreign, math_page):
    page = Page(math_page.replace("</body>", foreign + "</body>"))
    assert not all(load.startswith("data:") for load in page.loads)


def test_the_papers_numbers_stand_beside_ours_with_their_source(math_page):
    page = Page(math_page)
    assert {"results", "costs", "settings", "runs", "environment", "packages"} == set(page.tables)
    head, *lines = page.tables["results"]
    (misa,) = [line for line in lines if line[1] == "MISA δ 3%"]
    cells = dict(zip(head, misa, strict=True))
    assert cells["gsm8k"] == "70.00" and cells["gsm8k, paper"] == "71.31" and cells["average, paper"] == "73.61"
    assert "1 arXiv 2511.00056, Table 4" in page.text  # what the raised 1 of these cells means
    assert cells["heldout loss"] == "3.00002.0000 … 4.0000" and cells["seeds"] == "3 of 3"
    (lora,) = [line for line in lines if line[1].startswith("LoRA")]
    assert dict(zip(head, lora, strict=True))["gsm8k, paper"] == "not transcribed"
    (ours,) = [line for line in lines if line[1].startswith("this engine")]
    assert dict(zip(head, ours, strict=True))["gsm8k, paper"] == "not in the paper"
    assert "could not be checked" in page.text
    assert "failed: <RuntimeError> & more" in page.text  # escaped on its way


def test_cost_settings_and_provenance_are_on_the_page(math_page):
    page = Page(math_page)
    assert "Cost, computed and not measured" in page.text
    assert len(page.tables["costs"]) == 1 + len(page.tables["runs"]) - 1
    settings = {row[0]: row for row in page.tables["settings"][1:]}
    assert settings["delta"][1] == "0.03" and settings["preset"][2].startswith("published code")
    assert any(row[0] == "command" for row in page.tables["environment"])
    packages = {row[0]: row for row in page.tables["packages"][1:]}
    assert re.fullmatch(r"[0-9a-f]{16}", packages["torch"][2]) and packages["torch"][1]


def test_scale_tiny_says_that_its_numbers_rank_nothing():
    page = Page(page_of(whole("c4-130m", "tiny")))
    assert "its numbers rank nothing" in page.text
    claims = page.tables["claims"]
    assert len(claims) == 3 and {row[4] for row in claims[1:]} == {"not judged"}
    assert "rank nothing" not in Page(page_of(whole("c4-130m"))).text


def test_the_page_has_colours_for_light_and_dark(math_page):
    style = math_page.partition("<style>")[2].partition("</style>")[0]
    assert "color-scheme: light dark" in style
    light, dark = (set(re.findall(r"--\w+", part)) for part in style.split("@media (prefers-color-scheme: dark)"))
    named = set(re.findall(r"var\((--\w+)\)", style))
    assert named <= light and named <= dark


def test_numbers_have_the_digits_of_their_kind():
    assert number("peak_bytes", 20 * 2**30) == "20.00 GiB" and number("held_bytes", 2**20) == "1.00 MiB"
    assert (number("heldout_loss", 1.23456), number("gsm8k", 71.26), number("x", None)) == ("1.2346", "71.26", "–")


def sweep_page(folder):
    """The page of a study of eight trials that nobody ran."""
    optuna = pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")
    from misa_engine.sweep import page
    from misa_engine.sweep.results import collect
    from misa_engine.sweep.study import open_study
    from sweep_studies import settings

    about = settings()
    study = open_study(folder, about)
    for place in range(8):
        values = {"learning_rate": 10 ** -(3 + place / 4), "eta": (0.1, 0.5, 1.0)[place % 3]}
        spaces = {"learning_rate": optuna.distributions.FloatDistribution(1e-6, 1e-3, log=True),
                  "eta": optuna.distributions.CategoricalDistribution((0.1, 0.5, 1.0))}  # fmt: skip
        losses = [[step, 3.0 / step + place / 10] for step in (1, 2, 3)]
        study.add_trial(optuna.trial.create_trial(params=values, distributions=spaces, value=1.0 + place / 10,
            user_attrs={"losses": losses, "seconds": 1.0}))  # fmt: skip
    return page.page(collect(study, about, "study", "misa sweep --config <run>.yaml"))


@pytest.mark.parametrize("which", ("reproduce", "sweep"))
def test_a_browser_shows_tables_and_pictures(which, math_page, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: apt-get install chromium-headless-shell (looked for {', '.join(BROWSERS)})")
    made = math_page if which == "reproduce" else sweep_page(tmp_path)
    # the picture's size is set by what was decoded: a broken one has none
    script = "<script>for (const i of document.images) i.title = i.naturalWidth + 'x' + i.naturalHeight</script>"
    page, shot = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(made.replace("</body>", f"{script}</body>"), encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--window-size=1200,3000", "--virtual-time-budget=2000"]  # fmt: skip
    dom = subprocess.run(
        [*words, "--dump-dom", f"--screenshot={shot}", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert set(re.findall(r'<table id="([^"]+)"', dom.stdout)) == set(Page(made).tables), dom.stderr[-500:]
    sizes = re.findall(r'title="(\d+)x(\d+)"', dom.stdout)
    assert len(sizes) == made.count("<img ")
    assert all(int(width) > 400 and int(height) > 100 for width, height in sizes)
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (1200, 3000)
    from matplotlib.image import imread

    pixels = imread(shot)
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 20
