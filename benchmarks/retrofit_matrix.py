"""Ways of computing the same tokens, asked of a bare model and of two retrofits of it.

Shapes: B sequences, T tokens. Every way is compared with the plain forward pass of the sequences
alone; a difference is of logits, in units of their standard deviation there, or infinite where
texts differ.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from retrofit_subjects import PAD, VOCABULARY, Bare, Ours, Peft, families, load_peft
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

FAMILIES = (
    *("llama", "qwen3", "qwen3_moe", "mistral", "gemma3"),
    *("gpt_neox", "olmo2", "deepseek_v3", "qwen3_next"),
)
TOLERANCE = 1e-4
T = 23


def far(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.std())


def same(got: Any, wanted: Any) -> float:
    return 0.0 if got == wanted else float("inf")


def in_parts(subject: Bare, ids_BT: Tensor, sizes: list[int], cache: Any, **options: Any) -> Tensor:
    """Logits of calls that go on with a cache; masks and positions are cut like the ids."""
    subject.fresh()
    logits, start = [], 0
    for size in sizes:
        end = start + size
        cut = {name: values[:, start:end] for name, values in options.items()}
        if "attention_mask" in options:
            cut["attention_mask"] = options["attention_mask"][:, :end]
        part = {"input_ids": ids_BT[:, start:end], "past_key_values": cache, "use_cache": True}
        logits.append(subject.model(**part, **cut).logits)
        start = end
    return torch.cat(logits, dim=1)


def padded(ids_BT: Tensor, lengths: list[int], side: str) -> dict[str, Tensor]:
    """A batch of the first sequence's beginnings."""
    batch_BT = torch.full((len(lengths), T), PAD)
    mask_BT = torch.zeros_like(batch_BT)
    for row, length in enumerate(lengths):
        place = slice(T - length, T) if side == "left" else slice(0, length)
        batch_BT[row, place], mask_BT[row, place] = ids_BT[0, :length], 1
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    return {"ids_BT": batch_BT, "attention_mask": mask_BT, "position_ids": positions_BT}


LENGTHS = [T, 5, 2, 14, 7]


def token_by_token(subject: Bare, ids_BT: Tensor) -> float:
    cache = DynamicCache(config=subject.config)
    return far(in_parts(subject, ids_BT, [1] * T, cache), subject.logits(ids_BT))


def chunks(subject: Bare, ids_BT: Tensor) -> float:
    cache = DynamicCache(config=subject.config)
    return far(in_parts(subject, ids_BT, [5, 7, 1, 10], cache), subject.logits(ids_BT))


def prompt_then_tokens(subject: Bare, ids_BT: Tensor) -> float:
    cache = DynamicCache(config=subject.config)
    sizes = [13, *[1] * (T - 13)]
    return far(in_parts(subject, ids_BT, sizes, cache), subject.logits(ids_BT))


def left_padded(subject: Bare, ids_BT: Tensor) -> float:
    wanted_T = subject.logits(ids_BT[:1])[0]
    got = subject.logits(**padded(ids_BT, LENGTHS, "left"))
    return max(far(got[b, T - n :], wanted_T[:n]) for b, n in enumerate(LENGTHS))


def right_padded(subject: Bare, ids_BT: Tensor) -> float:
    wanted_T = subject.logits(ids_BT[:1])[0]
    got = subject.logits(**padded(ids_BT, LENGTHS, "right"))
    return max(far(got[b, :n], wanted_T[:n]) for b, n in enumerate(LENGTHS))


def packed_documents(subject: Bare, ids_BT: Tensor) -> float:
    lengths = [9, 3, 11]
    parts = list(ids_BT[:1].split(lengths, dim=1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    wanted = torch.cat([subject.logits(part) for part in parts], dim=1)
    return far(subject.logits(ids_BT[:1], position_ids=positions), wanted)


def greedy(subject: Bare, ids_BT: Tensor) -> float:
    return same(subject.text(ids_BT), subject.text(ids_BT, use_cache=False))


def mixed_lengths(subject: Bare, ids_BT: Tensor) -> float:
    lengths = [T, 3, 11]
    batch = padded(ids_BT, lengths, "left")
    got = subject.text(batch["ids_BT"], attention_mask=batch["attention_mask"])
    return same(got, [subject.text(ids_BT[:1, :n], use_cache=False)[0] for n in lengths])


def beams(subject: Bare, ids_BT: Tensor) -> float:
    options = {"num_beams": 3, "num_return_sequences": 3}
    return same(subject.text(ids_BT, **options), subject.text(ids_BT, use_cache=False, **options))


def assisted(subject: Bare, ids_BT: Tensor) -> float:
    """The draft is the backbone with noise on its weights: it is right now and then."""
    draft = families.bare(subject.family)
    for weight in draft.parameters():
        weight += 0.05 * torch.randn_like(weight)
    got = subject.text(ids_BT[:1], assistant_model=draft)
    return same(got, subject.text(ids_BT[:1], use_cache=False))


def static_cache(subject: Bare, ids_BT: Tensor) -> float:
    cache = StaticCache(config=subject.config, max_cache_len=2 * T)
    return far(in_parts(subject, ids_BT, [9, 1, 1, 12], cache), subject.logits(ids_BT))


def prefix_reused(subject: Bare, ids_BT: Tensor) -> float:
    """A prefix is read once and continued twice."""
    subject.fresh()
    prefix = DynamicCache(config=subject.config)
    subject.model(input_ids=ids_BT[:1, :13], past_key_values=prefix, use_cache=True)
    texts = [ids_BT[:1], torch.cat([ids_BT[:1, :13], ids_BT[1:, :5]], dim=1)]
    got = [subject.text(text, past_key_values=copy.deepcopy(prefix)) for text in texts]
    return same(got, [subject.text(text, use_cache=False) for text in texts])


def embeddings(subject: Bare, ids_BT: Tensor) -> float:
    wanted = subject.logits(ids_BT)
    embedded = embedding(subject)(ids_BT)
    options = {"use_cache": False, **subject.beside(ids_BT)}
    return far(subject.model(inputs_embeds=embedded, **options).logits, wanted)


def embedding(subject: Bare) -> nn.Module:
    model = subject.model.base_model if isinstance(subject, Peft) else subject.model
    return model.get_input_embeddings()


def saved(subject: Bare, ids_BT: Tensor) -> float:
    with tempfile.TemporaryDirectory() as directory:
        other: Bare = subject.reloaded(Path(directory))
        return far(other.logits(ids_BT), subject.logits(ids_BT))


CELLS: dict[str, tuple[str, Callable[[Bare, Tensor], float]]] = {
    "token_by_token": ("cached, token by token", token_by_token),
    "prompt_then_tokens": ("cached, a prompt, then token by token", prompt_then_tokens),
    "chunks": ("cached, in chunks", chunks),
    "left_padded": ("left-padded batch", left_padded),
    "right_padded": ("right-padded batch", right_padded),
    "packed": ("packed documents", packed_documents),
    "greedy": ("greedy text", greedy),
    "mixed": ("greedy text, a batch of mixed lengths", mixed_lengths),
    "beams": ("beam search, 3 beams", beams),
    "assisted": ("assisted generation, drafts taken back", assisted),
    "static": ("static cache", static_cache),
    "prefix": ("a cached prefix continued twice", prefix_reused),
    "embeddings": ("inputs_embeds, ids or rows beside", embeddings),
    "saved": ("saved and opened again", saved),
}
"""Name -> what it is, and how it is asked."""
STEP_0 = "untrained: the bare model's logits"
"""The one more cell, `step_0`."""


class Cell(NamedTuple):
    """status: ok, wrong, refused (it raises: message), or bare (the bare model deviates)."""

    status: str
    difference: float | None
    """None where texts are compared, or nothing came back."""
    message: str = ""


def ask(way: Callable[[], float]) -> Cell:
    """One cell, whatever happens in it."""
    try:
        found = way()
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else ""
        return Cell("refused", None, f"{type(error).__name__}: {line}"[:200])
    status = "ok" if found < TOLERANCE else "wrong"
    return Cell(status, found if found != float("inf") else None)


@torch.no_grad()
def matrix(peft_directory: Path) -> dict[str, dict[str, dict[str, Cell]]]:
    """Family -> cell -> who -> what came out."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peft = load_peft(peft_directory)
    ids_BT = torch.randint(2, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(9))
    return {family: _family(peft, family, ids_BT) for family in FAMILIES}


def _family(peft: Any, family: str, ids_BT: Tensor) -> dict[str, dict[str, Cell]]:
    bare, ours = Bare(family), Ours(family)
    theirs = Peft(peft, family, ours)
    wanted, spoken = bare.logits(ids_BT), ours.logits(ids_BT)
    assert far(spoken, wanted) > 1, "the memory does not matter"
    assert far(theirs.logits_at(ours, ids_BT), spoken) < TOLERANCE, "another memory"
    at_first = {"ours": Ours(family, trained=False), "peft": Peft(peft, family)}
    at_first["peft_no_conv"] = at_first["peft"]
    cells = {
        "step_0": {
            who: ask(lambda each=each: far(each.logits(ids_BT), wanted))  # type: ignore[misc]
            for who, each in at_first.items()
        }
    }
    subjects = {
        "bare": bare,
        "ours": ours,
        "peft": theirs,
        "peft_no_conv": Peft(peft, family, ours, conv=False),
    }
    for name, (_, way) in CELLS.items():
        cells[name] = {}
        for who, subject in subjects.items():
            torch.manual_seed(3)
            cells[name][who] = ask(lambda w=way, s=subject: w(s, ids_BT))  # type: ignore[misc]
    return cells
