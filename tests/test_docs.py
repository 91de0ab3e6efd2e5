"""Pages say what is true: names, files, flags, tests and tables that they mention exist and are current."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from documentation import docs_script
from misa_engine import MisaConfig
from misa_engine.method.config import CHOICES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module")
def make_tables():
    with docs_script("make_tables") as script:
        yield script


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str = "") -> list[str]:
    """Contents of the fenced blocks of ``language`` ("" = without one)."""
    fenced = re.findall(r"^```([^\n]*)\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [content for kind, content in fenced if kind == language]


@cache
def names_of_tests() -> frozenset[str]:
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    return frozenset(name for file in files for name in re.findall(r"^ *def (test_\w+)", text_of(file), re.MULTILINE))


@cache
def flags_of_misa() -> frozenset[str]:
    """What ``--help`` of each command shows, and for ``misa train`` every option of SFTConfig as well."""
    from trl import SFTConfig

    from misa_engine.cli.main import COMMANDS, main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for words in (["--help"], ["bench", "learning", "--help"], *([command, "--help"] for command in COMMANDS)):
            try:
                ended = main(words)
            except SystemExit as end:  # argparse's way to end --help
                ended = end.code
            assert not ended, words
    flags = set(re.findall(r"--(?:\[no_\])?([a-z]\w*)", shown.getvalue()))
    return frozenset(f"--{name}" for name in flags | {field.name for field in fields(SFTConfig)})


@EACH_PAGE
def test_dotted_names_exist(page):
    for name in set(re.findall(r"\bmisa_engine(?:\.[A-Za-z_]\w*)+", text_of(page))):
        if re.search(r"\.(py|yaml|whl)$", name):
            continue
        parts, found = name.split("."), None
        for split in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:split]))
            except ModuleNotFoundError:
                continue
            for part in parts[split:]:
                assert hasattr(found, part), f"{page.name} mentions {name}, but {part} is not there"
                found = getattr(found, part)
            break
        assert found is not None, name


@EACH_PAGE
def test_files_and_folders_exist(page):
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`((?:misa_engine|kernels|bench|tests|docs|examples|\.ci)/[\w./-]*)`", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []


@EACH_PAGE
def test_tests_exist(page):
    named = set(re.findall(r"`(test_\w+)`", text_of(page)))
    assert named - names_of_tests() - {path.stem for path in (ROOT / "tests").glob("test_*.py")} == set()


def test_every_promise_names_a_test():
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| (.+) \|$", text_of(ROOT / "docs/guarantees.md"), re.MULTILINE)
    assert len(rows) > 20
    assert [promise for promise, tests in rows if "`test_" not in tests] == []


@EACH_PAGE
def test_flags_exist(page):
    """In the commands of ``misa`` and wherever a flag is named in the text."""
    used: set[str] = set()
    for line in "\n".join(blocks(page) + blocks(page, "bash")).splitlines():
        used |= {
            word.partition("=")[0] for word in shlex.split(line, comments=True) if "misa " in line and word[:2] == "--"
        }
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    used |= {
        flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    others = set(re.findall(r"`(?:accelerate|pytest|mkdocs|ruff|pip|bash|mypy|python tests/soak)[^`]*`", prose))
    foreign = {flag for code in others for flag in re.findall(r"--[a-z][\w-]*", code)}
    assert used - foreign - flags_of_misa() - {"--help"} == set()


@EACH_PAGE
def test_python_blocks_parse_and_import_what_exists(page):
    for source in blocks(page, "python"):
        tree = ast.parse(source.replace(", ..., ", ", "))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readme_loop_trains():
    """The six lines of the README, on a tiny model."""
    from training import batches, tiny

    (source, _) = blocks(ROOT / "README.md", "python")
    ids = batches()
    model = tiny()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loader = [{"input_ids": batch, "labels": batch} for batch in (next(ids), next(ids))]
    names = {"model": model, "loader": loader}
    exec(compile(source.replace("delta=0.03", "delta=0.2"), "README.md", "exec"), names)
    assert names["optimizer"].total_steps == 2
    assert any(not (before[name] == parameter).all() for name, parameter in model.named_parameters())


def test_the_test_command_is_the_one_that_ci_runs():
    pattern = re.search(r"grep -m1 -E '([^']+)' README.md", text_of(ROOT / ".ci/run"))
    assert pattern is not None
    (command,) = re.findall(pattern[1], text_of(ROOT / "README.md"), re.MULTILINE)
    assert command == "pip install -c constraints.txt -e '.[train,test]' && pytest"


def stale(make_tables, **made: str) -> list[str]:
    """Names of the tables whose page says something else; ``made`` are contents known already."""
    return [
        f"{path.name}: {name}"
        for (path, name), make in make_tables.TABLES.items()
        if make_tables.between(text_of(path), name)[1] != (made[name] if name in made else make())
    ]


def test_generated_tables_are_current(make_tables):
    """After a change of an option, a card, a formula or the benchmark's results: python docs/make_tables.py."""
    written = make_tables.between(text_of(ROOT / "README.md"), "what fits")[1]
    assert stale(make_tables, **{"what fits": written}) == [], "run: python docs/make_tables.py"
    *_, row = make_tables.what_fits(("llama-3-8b",)).splitlines()
    assert row in written.splitlines(), "run: python docs/make_tables.py"
    assert [line.split("|")[1].strip() for line in written.splitlines()[2:]] == list(make_tables.MODELS)


def test_the_benchmark_page_is_made_from_the_stored_results(make_tables):
    """misa bench --render bench/results/cpu/results.json --into docs/benchmarks.md."""
    from misa_engine.bench import tables

    document = json.loads(text_of(make_tables.RESULTS))
    pictures = [Path("../bench/results/cpu", f"{name}.png") for name in ("time_and_memory", "phases")]
    made = tables.page(document, pictures).partition("\n")[2].strip()
    assert make_tables.between(text_of(ROOT / "docs/benchmarks.md"), "misa bench")[1] == made


def test_the_learning_pages_are_made_from_the_stored_results(make_tables):
    """misa bench --render bench/results/learning/NAME/results.json --into docs/benchmarks.md."""
    from misa_engine.bench import learning_results

    # quick shows that everything runs and ranks nothing: its page stays beside its results
    stored = sorted(path for path in make_tables.LEARNING.glob("*/results.json") if path.parent.name != "quick")
    assert {"small", "real"} <= {path.parent.name for path in stored}
    for path in stored:
        document = json.loads(text_of(path))
        tasks = dict.fromkeys(row["task"] for row in document["results"])
        names = [f"{kind}_{task}.png" for task in tasks for kind in ("learning", "memory")]
        pictures = [Path("../bench/results/learning", path.parent.name, name) for name in names]
        made = learning_results.page(document, pictures).partition("\n")[2].strip()
        marker = f"misa bench learning {path.resolve().parent.name}"
        assert make_tables.between(text_of(ROOT / "docs/benchmarks.md"), marker)[1] == made


@pytest.mark.exhaustive
def test_every_row_of_what_fits_is_current(make_tables):
    assert stale(make_tables) == [], "run: python docs/make_tables.py"


def test_the_table_of_options_has_every_field_once(make_tables):
    _, content, _ = make_tables.between(text_of(ROOT / "docs/guide/options.md"), "options")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ", content, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(field.name for field in fields(MisaConfig))
    defaults = dict(rows)
    assert defaults["delta"] == f"`{MisaConfig().delta!r}`" and defaults["score"] == "the preset's"


def test_settings_named_for_related_methods_are_valid():
    """`option=value` in the text is an option and one of its values."""
    checked = 0
    for page in PAGES:
        for option, value in re.findall(r"`(\w+)=\"(\w+)\"`", text_of(page)):
            if option in CHOICES:
                assert value in CHOICES[option], f"{page.name}: {option}={value}"
                checked += 1
    assert checked > 15


def test_quoted_errors_are_raised_somewhere():
    """The first column of the table of errors is a piece of a message in the sources."""
    rows = re.findall(r"^\| `([^`]+)` \| ", text_of(ROOT / "docs/troubleshooting.md"), re.MULTILINE)
    assert len(rows) >= 15
    pieces = []
    for file in [*(ROOT / "misa_engine").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.JoinedStr):
                pieces.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(node.value)
    sources = "\n".join(pieces)
    assert [text for text in rows if text not in sources] == []


@pytest.fixture(scope="module")
def hooks():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("hooks")
    finally:
        sys.path.remove(str(ROOT / "docs"))


def page_of_site(name: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


def test_the_list_of_errors_is_made_from_the_sources(hooks):
    listed = hooks.error_list()
    assert "### engine/guards.py" in listed and "is float16, whose gradients underflow" in listed
    assert listed.count("\n- ") > 100
    assert hooks.on_page_markdown("a <!-- errors --> b", page_of_site("troubleshooting.md")) == f"a {listed} b"


@pytest.mark.parametrize(
    ("link", "on_site"),
    [
        ("[Algorithm](../algorithm.md)", "[Algorithm](../algorithm.md)"),
        ("[`a.py`](../../examples/plain_loop.py)", "`a.py`"),
        ("[a](../../README.md)", "`a`"),
        ("![loss](../../bench/results/cpu/loss.png)", "![loss](bench/results/cpu/loss.png)"),
        ("[x](https://arxiv.org/abs/2511.00056)", "[x](https://arxiv.org/abs/2511.00056)"),
        ("[x](#here)", "[x](#here)"),
    ],
)
def test_links_that_leave_the_pages_are_fitted_to_the_site(hooks, link, on_site):
    assert hooks.on_page_markdown(link, page_of_site("guide/options.md")) == on_site


def test_pages_of_the_site_are_all_in_its_navigation():
    listed = set(re.findall(r"[\w/]+\.md", text_of(ROOT / "mkdocs.yml")))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


def test_the_readme_is_a_page_and_says_who_decides_about_the_licence():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 190 and "owner's decision" in text


def test_the_citation_names_paper_engine_and_version():
    yaml = pytest.importorskip("yaml")
    import misa_engine

    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["version"] == misa_engine.__version__
    assert "2511.00056" in citation["preferred-citation"]["url"] and len(citation["preferred-citation"]["authors"]) == 6
    keys = {"cff-version", "message", "title", "authors"}
    assert keys <= set(citation)


def test_pre_commit_runs_what_ci_runs():
    yaml = pytest.importorskip("yaml")
    (repository,) = yaml.safe_load(text_of(ROOT / ".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    entries = {hook["entry"] for hook in repository["hooks"]}
    ci = text_of(ROOT / ".ci/run")
    assert {"ruff check", "ruff format --check", "lint-imports --no-cache", "mypy"} <= entries
    assert all(entry in ci for entry in ("ruff check", "ruff format --check", "lint-imports --no-cache", "mypy"))
    assert any(entry.startswith("mkdocs build --strict") for entry in entries) and "mkdocs build --strict" in ci
