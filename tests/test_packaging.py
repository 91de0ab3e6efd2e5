"""What is installed: the links misa_engine/kernels and misa_engine/bench become real folders and work as such."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "bench")
PIP_INSTALL = ("-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "-q")


def run(*command: str | Path, cwd: Path) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), built without the network from a copy: setuptools writes beside setup.py."""
    place = tmp_path_factory.mktemp("build")
    source = place / "source"
    skip = shutil.ignore_patterns(".git", "results", "__pycache__", "*.egg-info", "build", "site", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    hook = "from setuptools import build_meta as b; print(b.build_sdist('..')); print(b.build_wheel('..'))"
    sdist, wheel = (
        line for line in run(sys.executable, "-c", hook, cwd=source).split("\n") if line.startswith("misa_")
    )
    return place / wheel, place / sdist


def expected() -> set[str]:
    """Every module of ours, the recipes and the marker of typed packages, by their name in a distribution."""
    package = [path for path in (ROOT / "misa_engine").rglob("*.py") if "__pycache__" not in path.parts]
    names = {path.relative_to(ROOT).as_posix() for path in package}
    names |= {f"misa_engine/{path.relative_to(ROOT)}" for link in LINKED for path in (ROOT / link).rglob("*.py")}
    names |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "misa_engine/recipes").glob("*.yaml")}
    assert "misa_engine/kernels/tiles.py" in names and len(names) > 60
    return names | {"misa_engine/py.typed"}


def test_the_wheel_holds_every_module_also_behind_the_links(built):
    assert expected() <= set(zipfile.ZipFile(built[0]).namelist())


def test_the_wheel_installs_no_package_of_another_name(built):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(built[0]).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"misa_engine"}


def test_the_source_distribution_holds_every_module_and_builds(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        # early 3.10 and 3.11 have no filters; the archive is our own
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert expected() <= names
    (source,) = tmp_path.iterdir()
    assert "misa_engine" in run(sys.executable, "setup.py", "--name", cwd=source)


def test_an_installed_wheel_works_and_knows_its_own_errors(built, tmp_path):
    target = tmp_path / "site"
    run(sys.executable, *PIP_INSTALL, "--target", target, built[0], cwd=tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(target)!r})
import misa_engine.bench, misa_engine.kernels.adamw
from misa_engine.errors import exit_code
from misa_engine.kernels.backend import choose_backend
from misa_engine.method.config import MisaConfig
assert misa_engine.kernels.adamw.__file__.startswith({str(target)!r})
for wrong in (lambda: MisaConfig(delta=0), lambda: choose_backend("cpu", "cpu"), lambda: int("x")):
    try:
        wrong()
    except ValueError as error:
        print(exit_code(error))
"""
    assert run(sys.executable, "-c", script, cwd=tmp_path).split() == ["2", "2", "1"]


def test_the_version_is_written_once(built):
    import misa_engine

    assert built[0].name.startswith(f"misa_engine-{misa_engine.__version__}-")
    assert f'version="{misa_engine.__version__}"' not in (ROOT / "setup.py").read_text()
