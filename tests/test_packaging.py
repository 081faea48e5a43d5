"""What a user of pip gets: the sdist and the wheel made of it, tried outside the repository."""

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

import sedd_jax

WEB = runpy.run_path(str(REPOSITORY / "launch/web.py"))
absolute_links = WEB["absolute_links"]
SITE = "https://github.com/owner/name"
pytestmark = pytest.mark.xdist_group("packaging")  # built once


@pytest.mark.parametrize(
    ("markdown", "with_site", "without"),
    [
        ("[a](docs/a.md#b)", f"[a]({SITE}/blob/v1/docs/a.md#b)", "a"),
        ("![a](docs/a.png)", f"![a]({SITE}/raw/v1/docs/a.png)", ""),
        ("[`a`](configs/)", f"[`a`]({SITE}/blob/v1/configs)", "`a`"),
        ("[a](https://b) [c](#d)", "[a](https://b) [c](#d)", "[a](https://b) [c](#d)"),
        ("`x[i](t)` and\n```\n[a](b)\n```\n", "`x[i](t)` and\n```\n[a](b)\n```\n", None),
        ("[![a](https://b)](c)", f"[![a](https://b)]({SITE}/blob/v1/c)", "![a](https://b)"),
        ("[![a](b.png)](c)", f"[![a]({SITE}/raw/v1/b.png)]({SITE}/blob/v1/c)", ""),
    ],
)
def test_relative_links_alone_become_absolute(markdown, with_site, without):
    assert absolute_links(markdown, SITE, "v1") == with_site
    assert absolute_links(markdown, "", "v1") == (markdown if without is None else without)


def test_links_of_a_file_in_a_folder_start_there():
    assert absolute_links("[a](../b.py)", SITE, "v1", "docs") == f"[a]({SITE}/blob/v1/b.py)"
    assert absolute_links("[a](b.md)", SITE, "v1", "docs") == f"[a]({SITE}/blob/v1/docs/b.md)"
    inside = absolute_links("[a](b.md#c) [d](../b.py)", SITE, "v1", "docs", site="docs")
    assert inside == f"[a](b.md#c) [d]({SITE}/blob/v1/b.py)"


def test_every_link_of_the_readme_leads_to_a_file():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    paths = re.findall(rf"{SITE}/(?:blob|raw)/v1/([^)#\s]+)", absolute_links(readme, SITE, "v1"))
    assert len(paths) > 10
    assert not [path for path in paths if not (REPOSITORY / path).exists()]


def run(*command, cwd: Path, **environment: str) -> str:
    """The output; the test fails with it where the command does."""
    made = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-6000:]
    return made.stdout


def build(hook: str, source: Path, out: Path) -> Path:
    """What `python -m build --no-isolation` makes; setuptools' own files go to `out` too."""
    settings = {"--global-option": ["egg_info", f"--egg-base={out}"]}
    code = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r}, {settings})"
    run(sys.executable, "-c", code, cwd=source)
    (built,) = [path for path in out.iterdir() if path.suffix in (".gz", ".whl")]
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("build_sdist", REPOSITORY, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.with_name(sdist.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    return build("build_wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder of the installed wheel, beside the libraries of this Python."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, f"--target={folder}", wheel, cwd=folder)
    return folder


def test_the_sdist_holds_the_repository(unpacked):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a clone: what is compared is git's list of files")
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = run(*list_files, cwd=REPOSITORY).splitlines()
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert not [path for path in listed if path not in there and (REPOSITORY / path).exists()]
    assert there - {*listed} == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_its_configs_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    kinds = (".py", ".html", ".textproto", "py.typed")
    package = [path for path in (REPOSITORY / "sedd_jax").rglob("*") if path.name.endswith(kinds)]
    expected = {str(path.relative_to(REPOSITORY)) for path in package}
    expected |= {f"sedd_jax/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.py")}
    assert names == expected


def test_pypi_accepts_the_descriptions(sdist, wheel):
    said = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=wheel.parent)
    assert said.count("PASSED") == 2


def test_the_sdist_can_run_its_tests(unpacked):
    """All are imported, and some are run that read files beside the package's."""
    chosen = "planted_import or without_outputs or every_link or every_key"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    said = run(*command, "tests", cwd=unpacked, PYTHONPATH=str(unpacked))
    assert int(re.search(r"(\d+) passed", said)[1]) >= 4


def test_the_wheel_works_outside_the_repository(installed, tmp_path):
    code = "import sedd_jax, sedd_jax.configs as c; print(sedd_jax.__file__, c.__file__)"
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.split() == [f"{installed}/sedd_jax/{name}__init__.py" for name in ("", "configs/")]

    module = [sys.executable, "-m", "sedd_jax", "train", "--help"]
    said = run(*module, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "--config=quickstart" in said
    assert "configs/" not in said  # a folder of the repository
    small = ["--config.model.hidden_size=32", "--config.model.blocks=1", "--config.model.heads=2"]
    steps = ["--config.train.steps=2", "--config.train.log_every=1", "--config.train.eval_every=9"]
    train = [installed / "bin/sedd-train", "--config=quickstart", "--workdir=run", *small, *steps]
    said = run(*train, cwd=tmp_path, PYTHONPATH=str(installed))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) >= 2, said


def test_the_version_and_the_address_are_the_same_everywhere():
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {sedd_jax.__version__}\n" in citation
    address = WEB["REPOSITORY"]
    if address:
        assert f"\nrepository-code: {address}\n" in citation
        colab = address.replace("https://github.com", "https://colab.research.google.com/github")
        assert f"]({colab}/blob/" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    source = f'SOURCE = "{address and f"git+{address}"}"'
    for path in (REPOSITORY / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = "".join(line for cell in cells for line in cell["source"]).splitlines()
        assert lines.count(source) == 1
