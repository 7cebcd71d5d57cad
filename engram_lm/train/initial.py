"""Initial weights from a saved model."""

from pathlib import Path
from typing import Any

from engram_lm.errors import MismatchError
from engram_lm.memory.canonical import backend_of, vocabulary_size
from engram_lm.model.modeling import EngramLMForCausalLM


def load(directory: Path, tokenizer: Any) -> EngramLMForCausalLM:
    """The model of a saved directory, in float32, to be trained on with this tokenizer.

    MismatchError where the tokenizer beside the weights, or a memory's canonical map, is another's,
    or has more ids than the model.
    """
    model: EngramLMForCausalLM = EngramLMForCausalLM.from_pretrained(
        directory, tokenizer=tokenizer, dtype="float32"
    )
    token_ids = vocabulary_size(backend_of(tokenizer))
    if model.config.vocab_size < token_ids:
        raise MismatchError(
            f"vocab_size={model.config.vocab_size}: the tokenizer has {token_ids} token ids"
        )
    beside = directory / "tokenizer.json"
    if beside.is_file():
        saved, wanted = (backend_of(each).get_vocab() for each in (directory, tokenizer))
        if saved != wanted:
            raise MismatchError(
                f"{beside}: {len(saved)} tokens that are not the {len(wanted)} of the tokenizer "
                "to train with"
            )
    return model
