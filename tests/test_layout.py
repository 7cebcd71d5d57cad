"""The house: which room may import which, and what the package shows."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import engram_lm

PACKAGE = Path(engram_lm.__file__).parent
# memory <- store <- model <- evaluate, serving, simulate <- train, analysis <- studies <- cli
FLOORS = {
    "errors": 0,
    "whole": 0,
    "openmp": 0,
    "precision": 1,
    "memory": 1,
    "auto": 1,
    "config": 1,
    "corpus": 1,
    "store": 2,
    "model": 3,
    "evaluate": 4,
    "serving": 4,
    "simulate": 4,
    "train": 5,
    "analysis": 5,
    "studies": 6,
    "cli": 7,
    "__main__": 8,
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "engram_lm":
                found.update(f"engram_lm.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def room(name: str) -> str:
    return name.removeprefix("engram_lm").removeprefix(".").split(".")[0]


def test_no_room_imports_one_above_or_beside_it():
    for path in sorted(PACKAGE.rglob("*.py")):
        own = room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        for module in imports(path):
            other = room(module)
            if module.startswith("engram_lm.") and own != "__init__" and other != own:
                both_low = {own, other} == {
                    "memory",
                    "config",
                }
                assert both_low or FLOORS[other] < FLOORS[own], f"{path}: imports {module}"


def test_memory_works_without_transformers():
    for path in (PACKAGE / "memory").glob("*.py"):
        assert not any(module.startswith("transformers") for module in imports(path)), path
    code = (
        "import sys, engram_lm; engram_lm.Addresses, engram_lm.Table, engram_lm.Memory; "
        "import engram_lm.memory.fuse; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_sorted():
    assert engram_lm.__all__ == sorted(engram_lm.__all__)
    for name in engram_lm.__all__:
        assert getattr(engram_lm, name).__name__ == name
    assert not hasattr(engram_lm, "manager")


def test_every_public_name_says_what_it_gives():
    for name in engram_lm.__all__:
        shown = getattr(engram_lm, name)
        members = vars(shown).items() if isinstance(shown, type) else ()
        public = {
            f"{name}.{member}": value
            for member, value in members
            if not member.startswith("_")
            and isinstance(value, FunctionType | classmethod | property)
        }
        for where, value in {name: shown, **public}.items():
            text = inspect.getdoc(getattr(value, "__func__", value))
            assert text and not text.startswith(f"{name}("), where


def test_files_stay_small():
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 450, f"{path} has {lines} lines: one noun per file"
