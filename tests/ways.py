"""Ways of computing the same tokens. Each returns how far it is from the plain forward pass.

A difference of logits where a way gives logits, else 0 for the same texts and infinity for others.
Written against transformers alone, so that a bare model can be asked as well.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

T, NEW = 23, 8


def plain(model, ids: Tensor, **options) -> Tensor:
    return model(ids, use_cache=False, **options).logits


def text(model, ids: Tensor, **options) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))  # or padding ids are taken for it
    torch.manual_seed(3)
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


def alone(model, ids: Tensor) -> list[list[int]]:
    return text(model, ids, use_cache=False)


def far(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max())


def same(got, wanted) -> float:
    return 0.0 if got == wanted else float("inf")


def in_chunks(model, ids: Tensor, sizes: list[int], cache=None, **options) -> Tensor:
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        cut = {name: values[:, part] for name, values in options.items()}
        if "attention_mask" in options:
            cut["attention_mask"] = options["attention_mask"][:, : part.stop]
        logits.append(model(ids[:, part], past_key_values=cache, use_cache=True, **cut).logits)
        start += size
    return torch.cat(logits, dim=1)


def padded(ids: Tensor, lengths: list[int], side: str, width: int = T):
    batch = torch.ones(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[0, :length], 1
    return batch, mask, (mask.cumsum(1) - 1).clamp_min(0)


def token_by_token(model, ids: Tensor) -> float:
    return far(in_chunks(model, ids, [1] * T), plain(model, ids))


def chunked(model, ids: Tensor) -> float:
    wanted = plain(model, ids)
    return max(
        far(in_chunks(model, ids, sizes), wanted)
        for sizes in ([5] * 4 + [3], [1, 7, 2, 13], [13, 1, 1, 8])
    )


def _left_padded(model, ids: Tensor, read: Callable[..., Tensor]) -> float:
    lengths = [T, 1, 2, 14, 7]
    batch, mask, positions = padded(ids, lengths, "left")
    wanted = plain(model, ids[:1])
    got = read(model, batch, attention_mask=mask, position_ids=positions)
    return max(
        far(got[row, T - length :], wanted[0, :length]) for row, length in enumerate(lengths)
    )


def left_padded(model, ids: Tensor) -> float:
    return _left_padded(model, ids, plain)


def left_padded_in_steps(model, ids: Tensor) -> float:
    """One part with all the padding, then token by token."""

    def read(model, batch: Tensor, **options) -> Tensor:
        return in_chunks(model, batch, [T - 1, 1], **options)

    return _left_padded(model, ids, read)


def left_padded_in_chunks(model, ids: Tensor) -> float:
    """Padding in a later part too."""

    def read(model, batch: Tensor, **options) -> Tensor:
        return in_chunks(model, batch, [T - 9, 1, 8], **options)

    return _left_padded(model, ids, read)


def right_padded(model, ids: Tensor) -> float:
    """Where nothing is remembered of it: a batch that is scored."""
    lengths = [T, 1, 2, 14, 7]
    batch, mask, positions = padded(ids, lengths, "right")
    wanted = plain(model, ids[:1])
    masked = plain(model, batch, attention_mask=mask, position_ids=positions)
    unmasked = plain(model, batch)  # as lm-evaluation-harness does
    return max(
        far(got[row, :length], wanted[0, :length])
        for got in (masked, unmasked)
        for row, length in enumerate(lengths)
    )


def after_right_padding(model, ids: Tensor) -> float:
    lengths = [14, 1, 2, 9, 13]
    batch, mask, _ = padded(ids, lengths, "right", 14)
    more = ids[1:, :9].expand(len(lengths), -1)
    tokens = torch.cat([batch, more], dim=1)
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = in_chunks(model, tokens, [14, 1, 1, 7], attention_mask=mask, position_ids=positions)
    return max(
        far(
            got[row, 14:],
            plain(model, torch.cat([ids[:1, :length], more[:1]], dim=1))[0, length:],
        )
        for row, length in enumerate(lengths)
    )


def greedy(model, ids: Tensor) -> float:
    return same(text(model, ids), alone(model, ids))


def mixed_lengths(model, ids: Tensor) -> float:
    batch, mask, _ = padded(ids, [T, 3, 11], "left")
    wanted = [alone(model, ids[:1, :length])[0] for length in (T, 3, 11)]
    return same(text(model, batch, attention_mask=mask), wanted)


def sampled(model, ids: Tensor) -> float:
    return same(text(model, ids, do_sample=True), text(model, ids, do_sample=True, use_cache=False))


def beams(model, ids: Tensor) -> float:
    options = {"num_beams": 3, "num_return_sequences": 2}
    batch, mask, _ = padded(ids, [T, 9], "left")
    wanted = [text(model, each, use_cache=False, **options) for each in (ids[:1], ids[:1, :9])]
    return same(text(model, batch, attention_mask=mask, **options), wanted[0] + wanted[1])


def assisted(model, ids: Tensor) -> float:
    """By a draft that is mostly wrong, so that tokens are taken back, and by its own prompt."""
    draft = copy.deepcopy(model)
    draft.lm_head = torch.nn.Linear(32, 97, bias=False)
    wanted = alone(model, ids[:1])
    return max(
        same(text(model, ids[:1], assistant_model=draft), wanted),
        same(text(model, ids[:1], prompt_lookup_num_tokens=4), wanted),
    )


def rolled_back(model, ids: Tensor) -> float:
    cache = DynamicCache(config=model.config)
    model(ids[:, :3], past_key_values=cache, use_cache=True)
    cache.activate_past_recording()
    model(ids[:, 3:T].flip(1), past_key_values=cache, use_cache=True)
    cache.crop(-(T - 3 - 4))
    tokens = torch.cat([ids[:, :3], ids[:, 3:T].flip(1)[:, :4], ids[:, 7:]], dim=1)
    got = model(tokens[:, 7:], past_key_values=cache, use_cache=True).logits
    return far(got, plain(model, tokens)[:, 7:])


def static_cache(model, ids: Tensor) -> float:
    cache = StaticCache(config=model.config, max_cache_len=2 * T)
    wanted = plain(model, ids)
    batch, mask, _ = padded(ids, [T, 9], "left")
    texts = text(model, batch, attention_mask=mask, cache_implementation="static")
    return max(
        far(in_chunks(model, ids, [9, 1, 1, 12], cache), wanted),
        same(texts, alone(model, ids[:1]) + alone(model, ids[:1, :9])),
    )


DOCUMENTS = [9, 1, 2, 11]


def packed_documents(model, ids: Tensor) -> float:
    parts = [ids[i % 2 : i % 2 + 1, :length] for i, length in enumerate(DOCUMENTS)]
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    got = plain(model, torch.cat(parts, dim=1), position_ids=positions)
    return far(got, torch.cat([plain(model, part) for part in parts], dim=1))


def prefix_reused(model, ids: Tensor) -> float:
    """A prefix read once, continued twice, and once more after what was generated."""
    prefix = DynamicCache(config=model.config)
    model(ids[:1, :13], past_key_values=prefix, use_cache=True)
    other = torch.cat([ids[:1, :13], ids[1:, :5]], dim=1)
    got = [text(model, each, past_key_values=copy.deepcopy(prefix)) for each in (ids[:1], other)]
    wanted = [alone(model, each) for each in (ids[:1], other)]
    first = text(model, ids[:1], past_key_values=prefix)
    turn = torch.cat([ids[:1], torch.tensor(first), ids[1:, :4]], dim=1)
    got.append(text(model, turn, past_key_values=prefix))
    return same(got, [*wanted, alone(model, turn)])


def embeddings(model, ids: Tensor) -> float:
    """Of a prompt, with its ids beside them where there is a memory."""
    ids_beside = {"engram_input_ids": ids} if hasattr(model.config, "memory") else {}
    embedded = model.get_input_embeddings()(ids)
    got = model(inputs_embeds=embedded, use_cache=False, **ids_beside).logits
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1}
    texts = model.generate(inputs_embeds=embedded, **ids_beside, **options).tolist()
    return max(far(got, plain(model, ids)), same(texts, alone(model, ids)))


def compiled_step(model, ids: Tensor) -> float:
    """The decode step as one graph over a static cache."""
    torch.compiler.reset()
    counters.clear()
    model = copy.deepcopy(model)
    forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=2 * T)
    logits = []
    for begin, end in [(0, 9), *((at, at + 1) for at in range(9, 13))]:
        call = model.forward if begin == 0 else forward
        positions = torch.arange(begin, end)[None]
        options = {"past_key_values": cache, "use_cache": True, "position_ids": positions}
        logits.append(call(ids[:, begin:end], **options).logits)
    assert counters["stats"]["unique_graphs"] <= 2, "a graph for every step"
    torch.compiler.reset()
    return far(torch.cat(logits, dim=1), plain(model, ids[:, :13]))


WAYS: dict[str, Callable[..., float]] = {
    way.__name__: way
    for way in (
        *(token_by_token, chunked, left_padded, left_padded_in_steps, left_padded_in_chunks),
        *(right_padded, after_right_padding),
        *(greedy, mixed_lengths, sampled, beams, assisted, rolled_back, static_cache),
        *(packed_documents, prefix_reused, embeddings, compiled_step),
    )
}
