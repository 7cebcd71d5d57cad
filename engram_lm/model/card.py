"""README.md of a saved model: what it is, and how to open it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from engram_lm import whole
from engram_lm.model.budget import ledger
from engram_lm.model.config import EngramLMConfig

FILE_NAME = "README.md"
MARK = "<!-- Written by engram-lm at every save. Delete this line to keep your own words. -->"

_TRANSFORMERS = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)


def write(config: Any, directory: Path) -> None:
    """Writes the card, unless there is one that a person has made their own."""
    path = directory / FILE_NAME
    if not path.exists() or MARK in path.read_text() or _is_empty(path.read_text()):
        whole.write(path, card(config))


def _is_empty(text: str) -> bool:
    """Whether this is the template that transformers puts in place of a card when it uploads."""
    if "[More Information Needed]" not in text:
        return False
    template = ModelCard.from_template(ModelCardData(), model_description=_TRANSFORMERS)
    return ModelCard(text).text.split() == template.text.split()


def card(config: Any) -> str:
    """Markdown, with the front matter that the Hugging Face hub reads.

    config: an EngramLMConfig, or another family's with a memory.
    """
    own = isinstance(config, EngramLMConfig)
    kind = "A mixture-of-experts language model" if config.memory is None else "A language model"
    if not own:
        kind = f"A {config.model_type} model"
    if config.memory is not None:
        kind += " with conditional memory ([Engram](https://arxiv.org/abs/2601.07372))"
    tags = ["engram-lm", *(["engram", "conditional-memory"] if config.memory is not None else [])]
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(config).items())
    return f"""---
library_name: engram-lm
pipeline_tag: text-generation
tags:
{chr(10).join(f"- {tag}" for tag in tags)}
---
{MARK}
# {"engram_lm" if own else "engram_attached"}

{kind}, made with engram-lm.

```python
import engram_lm  # pip install engram-lm
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory or repository")
```

Without `import engram_lm` the call needs `trust_remote_code=True`, and the package all the same.
`engram info DIR` says whether every file is whole.

| | |
|---|---|
{rows}
{_tokenizer(config)}"""


def _facts(config: Any) -> dict[str, str]:
    facts = {"layers": f"{config.num_hidden_layers} of width {config.hidden_size}"}
    counted = ledger(config) if isinstance(config, EngramLMConfig) else None
    if counted is not None:
        facts |= {
            "residual streams": f"{config.streams}",
            "parameters": f"{counted.parameters:,}",
            "active per token": f"{counted.p_act:,}, token embedding and head not counted",
        }
    if memory := config.memory_config:
        specification = memory.specification
        asked = ", ".join(f"{rows:,}" for rows in specification.rows_per_head)
        rows = sum(specification.table_rows(layer) for layer in specification.layers)
        facts |= {
            "memory layers": f"{', '.join(map(str, specification.layers))}, counted from 0",
            "n-gram orders": f"2 to {specification.max_order}",
            "heads": f"{specification.heads} per order",
            "rows per head": f"the next primes from {asked} on, order by order",
            "values per row": f"{memory.head_dim}",
            "parameters in tables": f"{rows * memory.head_dim:,}",
            "specification": f"sha256 `{specification.digest}`",
        }
    if counted is not None and counted.rho is not None:
        facts["sparse parameters in experts"] = f"{counted.rho:.1%}"
    return facts


def _tokenizer(config: Any) -> str:
    memory = config.memory_config
    if memory is None or memory.specification.vocabulary is None:
        return ""
    vocabulary = memory.specification.vocabulary
    return f"""
Rows are chosen by token ids: only the tokenizer that this model was trained with will do. Its
{vocabulary.token_ids:,} ids fall into {vocabulary.canonical_ids:,} canonical ids; their map
has sha256 `{vocabulary.sha256}`.
"""
