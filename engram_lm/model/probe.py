"""What a family's own decoder gets wrong, measured before it is given a memory.

A memory must follow the family's masks and caches, and neither class names nor configurations say
what these can do. So a small copy of the family's class computes the same texts in several modes,
and each mode is compared with one plain forward pass over each text alone.

Shapes: B sequences, T tokens, W positions of the text so far, V token ids.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from engram_lm.model.small_copy import FIRST_ID, VOCABULARY, WINDOW, kinds, small_copy

PACKED, MASKED = "packed documents", "packed documents under a 4-D mask"
LEFT, AFTER, LATER = "left padding", "text after right padding", "padding in a later part"
STEPS, CHUNKS, CROP = "one token after another", "text in chunks", "crop"
LEFT_UNPLACED = "left padding without position_ids"
UNPLACED = "text after a cache without position_ids"
TOLERANCES = (5e-3, 0.02)
"""Standard deviations of logits that a mode may be off by: ten times what rounding makes of the
beginning of a text, within these bounds. In the families of transformers 5.23 rounding comes to
1e-5, in Zamba 2 to 0.002 and in Gemma 3n, whose activations have a threshold, to 0.006; a token
that is wrongly seen or missed comes to 0.05 at least."""

_T = 24
_DOCUMENTS = (9, 1, 2, 12)
_SHORT = (WINDOW, 1, 2, WINDOW - 1)
"""Documents within a sliding window, which a mask from outside replaces."""
_PAD = 1


_ONE_AT_A_TIME = threading.Lock()
"""The default dtype is that of all threads."""
_VERDICTS: dict[str, dict[str, str]] = {}
"""Class, layers and configuration -> what `probe` gave."""


def probe(family: Any, config: Any, layers: nn.ModuleList) -> dict[str, str]:
    """Mode -> what is wrong with it, for the modes that the bare family gets wrong.

    family: a causal language model's class of transformers; config: its model's, without memory;
    layers: the model's. All modes are wrong where no small copy can be made. Takes seconds at
    most (benchmarks/families.py records them), and once in a process for models alike.
    """
    layer_kinds = kinds(layers)
    record = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    key = repr((family, layer_kinds, sorted(record.items())))
    if key not in _VERDICTS:
        with _plain_surroundings():
            model = small_copy(family, config, layer_kinds)
            if model is None:
                words = "it could not be tried, because no small copy of the model could be made"
                return dict.fromkeys(MODES, words)
            _VERDICTS[key] = measure(model)
    return dict(_VERDICTS[key])


@contextmanager
def _plain_surroundings() -> Iterator[None]:
    """Float32 on the CPU, whatever the caller is in the middle of: a verdict stays."""
    with _ONE_AT_A_TIME:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
                torch.device("cpu"),
                torch.autocast("cpu", enabled=False),
            ):
                yield
        finally:
            torch.set_default_dtype(default)


def measure(model: Any) -> dict[str, str]:
    """Mode -> what is wrong with it, for a model of at least VOCABULARY token ids."""
    tried, problems = _Tried(model), {}
    for mode, deviation_of in MODES.items():
        try:
            deviation = deviation_of(tried)
        except Exception as error:  # whatever the family's own code raises
            line = (str(error).splitlines() or [""])[0]
            problems[mode] = f"{type(error).__name__}: {line[:120]}"
            continue
        if not deviation < tried.tolerance:
            problems[mode] = f"its logits are off by {deviation:.1g} standard deviations"
    return problems


class _Tried:
    """A small model, two texts, and the plain forward pass over any text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.ids_BT = torch.randint(FIRST_ID, VOCABULARY, (2, _T), generator=generator)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        logits_BTV = self.plain(self.ids_BT)
        self.scale = float(logits_BTV.std())
        beginning = self.plain(self.ids_BT[:1, : _T // 2])
        rounding = self.off(beginning, logits_BTV[:1, : _T // 2])
        self.tolerance = min(max(10 * rounding, TOLERANCES[0]), TOLERANCES[1])

    def plain(self, ids_BT: Tensor, **options: Any) -> Tensor:
        """Logits (B, T, V) of one pass without a cache."""
        logits_BTV: Tensor = self.model(input_ids=ids_BT, use_cache=False, **options).logits
        return logits_BTV

    def in_parts(
        self,
        ids_BT: Tensor,
        sizes: list[int] | None,
        mask_BT: Tensor | None = None,
        cache: Any = None,
        placed: bool = True,
    ) -> Tensor:
        """Logits of as many passes as there are sizes, through one cache; in one without any
        where sizes is None. placed: with position_ids, as `generate` gives them."""
        if sizes is None:
            sizes = [ids_BT.shape[1]]
        elif cache is None:
            cache = DynamicCache(config=self.model.config)
        logits, start = [], 0 if cache is None else cache.get_seq_length()
        for size in sizes:
            options: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
            stop = start + size
            seen_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
            if mask_BT is not None:
                options["attention_mask"] = mask_BT[:, :stop]
            if placed and self.takes_positions:
                positions_BT = (seen_BT.cumsum(1) - 1).clamp_min(0)
                options["position_ids"] = positions_BT[:, start:stop]
            logits.append(self.model(input_ids=ids_BT[:, start:stop], **options).logits)
            start = stop
        return torch.cat(logits, dim=1)

    def off(self, logits: Tensor, wanted: Tensor) -> float:
        """The largest difference, in standard deviations of logits; not a number if any is."""
        return float((logits - wanted).abs().max()) / self.scale


def _padded(ids_T: Tensor, lengths: list[int], width: int, left: bool) -> tuple[Tensor, Tensor]:
    """The beginnings of a text as a batch, and its mask."""
    batch_BT = torch.full((len(lengths), width), _PAD)
    mask_BT = torch.zeros_like(batch_BT)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        batch_BT[row, place], mask_BT[row, place] = ids_T[:length], 1
    return batch_BT, mask_BT


def _packed(tried: _Tried, lengths: Sequence[int] = _DOCUMENTS, **options: Any) -> float:
    if not tried.takes_positions:
        raise TypeError("its forward takes no position_ids")
    texts = [tried.ids_BT[i % 2, :length][None] for i, length in enumerate(lengths)]
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None]
    logits = tried.plain(torch.cat(texts, dim=1), position_ids=positions_BT, **options)
    return tried.off(logits, torch.cat([tried.plain(text) for text in texts], dim=1))


def _masked(tried: _Tried) -> float:
    blocks = [torch.ones(length, length).tril() for length in _SHORT]
    seen_BHTT = torch.block_diag(*blocks).bool()[None, None]
    hidden_BHTT = torch.zeros(seen_BHTT.shape).masked_fill(~seen_BHTT, torch.finfo().min)
    return _packed(tried, _SHORT, attention_mask=hidden_BHTT)


def _left(tried: _Tried) -> float:
    """As a batch is scored, and as it is read before the first token is generated."""
    return max(_beside_padding(tried, None), _beside_padding(tried, [_T]))


def _left_unplaced(tried: _Tried) -> float:
    return _beside_padding(tried, None, placed=False)


def _later(tried: _Tried) -> float:
    return _beside_padding(tried, [_T - 9, 1, 8])


def _beside_padding(tried: _Tried, sizes: list[int] | None, *, placed: bool = True) -> float:
    lengths = [_T, 1, 2, 14, 7]
    batch_BT, mask_BT = _padded(tried.ids_BT[0], lengths, _T, left=True)
    logits_BTV = tried.in_parts(batch_BT, sizes, mask_BT, placed=placed)
    wanted_TV = tried.plain(tried.ids_BT[:1])[0]
    return max(
        tried.off(logits_BTV[row, _T - length :], wanted_TV[:length])
        for row, length in enumerate(lengths)
    )


def _after(tried: _Tried) -> float:
    lengths, width, more = [14, 1, 2, 9, 13], 14, 4
    batch_BT, mask_BT = _padded(tried.ids_BT[0], lengths, width, left=False)
    more_BT = tried.ids_BT[1:, :more].expand(len(lengths), -1)
    batch_BT = torch.cat([batch_BT, more_BT], dim=1)
    mask_BT = torch.cat([mask_BT, torch.ones_like(more_BT)], dim=1)
    logits_BTV = tried.in_parts(batch_BT, [width, *[1] * more], mask_BT)
    deviations = []
    for row, length in enumerate(lengths):
        text = torch.cat([tried.ids_BT[:1, :length], more_BT[:1]], dim=1)
        deviations.append(tried.off(logits_BTV[row, width:], tried.plain(text)[0, length:]))
    return max(deviations)


def _steps(tried: _Tried, *, placed: bool = True) -> float:
    logits_BTV = tried.in_parts(tried.ids_BT, [9, *[1] * (_T - 9)], placed=placed)
    return tried.off(logits_BTV, tried.plain(tried.ids_BT))


def _unplaced(tried: _Tried) -> float:
    return _steps(tried, placed=False)


def _chunks(tried: _Tried) -> float:
    wanted = tried.plain(tried.ids_BT)
    sizes = ([5, 5, 5, 9], [1, 7, 2, 14])
    return max(tried.off(tried.in_parts(tried.ids_BT, each), wanted) for each in sizes)


def _crop(tried: _Tried) -> float:
    """Most of a draft is taken back, and another text goes on."""
    cache = DynamicCache(config=tried.model.config)
    draft_BT = torch.cat([tried.ids_BT[:, :3], tried.ids_BT[:, 3:].flip(1)], dim=1)
    tried.in_parts(draft_BT, [3], cache=cache)
    cache.activate_past_recording()
    tried.in_parts(draft_BT, [_T - 3], cache=cache)
    cache.crop(-(_T - 7))
    text_BT = torch.cat([draft_BT[:, :7], tried.ids_BT[:, 7:]], dim=1)
    logits = tried.in_parts(text_BT, [1] * 8, cache=cache)
    return tried.off(logits, tried.plain(text_BT)[:, 7:15])


MODES: dict[str, Callable[[_Tried], float]] = {
    PACKED: _packed,
    MASKED: _masked,
    LEFT: _left,
    LEFT_UNPLACED: _left_unplaced,
    AFTER: _after,
    LATER: _later,
    STEPS: _steps,
    UNPLACED: _unplaced,
    CHUNKS: _chunks,
    CROP: _crop,
}
