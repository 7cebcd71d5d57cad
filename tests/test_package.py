"""What is built and installed is the package tree, whole."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny import tiny_model

ROOT = Path(__file__).parents[1]
WHEEL = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
SDIST = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"


def package_files() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "engram_lm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def build(code: str, source: Path, out: Path) -> Path:
    """Runs one hook of the build backend, as pip does, without looking anything up."""
    command = [sys.executable, "-W", "ignore", "-c", code, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is built, so that building leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    for name in ("engram_lm", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build(SDIST, source, tmp_path_factory.mktemp("sdist"))


def test_the_source_distribution_holds_the_package_and_no_half_of_the_tests(sdist):
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert package_files() <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_a_wheel_built_from_it_holds_the_package_tree_and_nothing_else(sdist, tmp_path):
    subprocess.run([sys.executable, "-m", "tarfile", "-e", sdist, tmp_path], check=True)
    (unpacked,) = tmp_path.iterdir()
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(build(WHEEL, unpacked, tmp_path / "out")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read("engram_lm-0.1.0.dist-info/METADATA").decode()
        licenses = {name.split("licenses/")[1] for name in wheel.namelist() if "licenses/" in name}
    assert names == package_files()
    assert licenses == {"LICENSE", "engram_lm/wordnet/LICENSE"}
    assert "Requires-Dist: transformers<6,>=5.23" in metadata


@pytest.mark.long
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_works_in_an_empty_environment(kind, source, sdist, tmp_path):
    """Needs a package index: torch and transformers are installed anew."""
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    file = sdist if kind == "sdist" else build(WHEEL, source, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "empty"], check=True)
    python = [str(tmp_path / "empty" / "bin" / "python"), "-W", "ignore"]
    pip = [*python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, file], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        )
        return done.stdout

    engram = tmp_path / "empty" / "bin" / "engram"
    tokenizer = "import engram_lm.corpus as c; print(c.tokenizer_file())"
    path = run(*python, "-c", tokenizer).strip()
    assert path.startswith(str(tmp_path / "empty"))
    rows = json.loads(
        run(engram, "rows", "--spec=paper", "--text=the cat", f"--tokenizer={path}", "--json")
    )
    assert len(rows["layers"]) == 2
    assert json.loads(run(engram, "budget", "--json"))["tables"] > 0
    assert json.loads(run(engram, "info", model, "--json"))["whole"]
    opens = "import engram_lm; from transformers import AutoModelForCausalLM as M; "
    run(*python, "-c", f"{opens}M.from_pretrained({str(model)!r})")
