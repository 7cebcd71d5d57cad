"""Every way in which `generate` can go finds the same text and reads the same rows.

The twin of each is `generate(..., use_cache=False)`: one plain forward pass for every token.
"""

import copy

import pytest
import torch
from rows_read import Calls, rows_read
from tiny import DECODERS, PAIRED, phrases, tiny_model, trained_model
from transformers import DynamicCache, StaticCache

# Scores are sums of log-probabilities over 16 tokens, each to the 1e-4 of test_decoding.
TOLERANCE = 1e-3
T, NEW = 23, 16


OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in DECODERS if name not in PAIRED]


@pytest.fixture(scope="module", params=[*PAIRED, *OTHERS])
def model(request):
    return trained_model(*DECODERS[request.param])


@pytest.fixture(scope="module")
def largest():
    return trained_model(4, True, 3)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return phrases(2, T, seed=99)


def generate(model, ids, **options) -> tuple[list[list[int]], Calls]:
    """The new text of each sequence, and the calls that made it."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, **options}
    torch.manual_seed(7)
    with rows_read(model) as calls:
        texts = model.generate(ids, **options)
    return texts[:, ids.shape[1] :].tolist(), calls


def rows_of(model, ids, texts: list[list[int]]) -> torch.Tensor:
    """Row numbers that a plain forward pass reads for prompt and text; the last token is not
    read.
    """
    tokens = torch.cat([ids, torch.tensor(texts)], dim=1)[:, :-1]
    with rows_read(model) as calls, torch.no_grad():
        model(tokens, use_cache=False)
    return calls.of_the_text()


def assert_read(calls: Calls, wanted: torch.Tensor) -> None:
    """These rows were read; the last draft may have gone on behind the text."""
    assert torch.equal(calls.of_the_text()[:, :, : wanted.shape[2]], wanted)


@pytest.fixture(scope="module")
def greedy(model, ids) -> list[list[int]]:
    return generate(model, ids[:1], use_cache=False)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 5},
        {"assistant_early_exit": 1},
        {"assistant_early_exit": 2},
    ],
    ids=lambda options: "-".join(options) or "cached",
)
def test_greedy_text_and_rows_are_those_without_a_cache(model, ids, greedy, options):
    text, calls = generate(model, ids[:1], **options)
    assert text == greedy
    assert_read(calls, rows_of(model, ids[:1], text))


def without_memory():
    return tiny_model(1, memory=None)


def smaller():
    return trained_model(1, False, 2, steps=6)


@pytest.mark.parametrize("assistant", [smaller, without_memory], ids=lambda f: f.__name__)
def test_assisted_text_is_the_greedy_text_though_drafts_are_rejected(model, ids, greedy, assistant):
    text, calls = generate(model, ids[:1], assistant_model=assistant())
    assert text == greedy and calls.taken_back > 0
    assert_read(calls, rows_of(model, ids[:1], text))


def test_a_model_with_memory_assists_one_without_and_one_with(model, ids):
    for target in (without_memory(), smaller()):
        text, _ = generate(target, ids[:1], use_cache=False)
        with rows_read(model) as calls:
            assert generate(target, ids[:1], assistant_model=model)[0] == text
        assert calls.taken_back > 0


@pytest.mark.parametrize("new", range(1, 9))
def test_an_assisted_text_may_end_in_the_middle_of_a_draft(largest, ids, new):
    plain, _ = generate(largest, ids[:1], use_cache=False, max_new_tokens=new)
    for options in ({"assistant_model": smaller()}, {"prompt_lookup_num_tokens": 6}):
        assert generate(largest, ids[:1], max_new_tokens=new, **options)[0] == plain


def test_a_cache_can_go_on_after_an_assisted_text(largest, ids):
    cache = DynamicCache(config=largest.config)
    first, _ = generate(largest, ids[:1], assistant_model=smaller(), past_key_values=cache)
    turn = torch.cat([ids[:1], torch.tensor(first), ids[1:]], dim=1)
    plain, _ = generate(largest, turn, use_cache=False)
    assert generate(largest, turn, past_key_values=cache)[0] == plain


def beams(model, ids, **options):
    options = {"num_beams": 3, "num_return_sequences": 3, "pad_token_id": 1, **options}
    torch.manual_seed(7)
    with rows_read(model) as calls:
        output = model.generate(
            ids, max_new_tokens=NEW, output_scores=True, return_dict_in_generate=True, **options
        )
    return output, calls


@pytest.mark.parametrize("sampled", [False, True], ids=["search", "sample"])
def test_three_beams_find_the_same_texts_scores_and_rows_with_and_without_cache(
    model, ids, sampled
):
    plain, twin = beams(model, ids, use_cache=False, do_sample=sampled)
    got, calls = beams(model, ids, do_sample=sampled)
    assert torch.equal(got.sequences, plain.sequences)
    assert (got.sequences_scores - plain.sequences_scores).abs().max() < TOLERANCE
    assert len(calls.rows) == len(twin.rows) == NEW
    for rows, every in zip(calls.rows, twin.rows, strict=True):
        assert torch.equal(rows, every[:, :, -rows.shape[2] :])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_three_beams_of_a_left_padded_batch_find_the_texts_of_the_sequences_alone(
    model, ids, cache
):
    batch, mask = left_padded(ids)
    got, _ = beams(model, batch, attention_mask=mask, cache_implementation=cache)
    alone = [beams(model, one, use_cache=False)[0] for one in (ids[:1], ids[1:, 9:])]
    texts = [text for one in alone for text in one.sequences[:, -NEW:].tolist()]
    assert got.sequences[:, -NEW:].tolist() == texts
    scores = torch.cat([one.sequences_scores * NEW for one in alone])
    assert (got.sequences_scores * NEW - scores).abs().max() < TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sampling_with_a_seed_gives_the_texts_without_a_cache(model, ids, cache):
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 10}
    plain, _ = generate(model, ids, use_cache=False, **options)
    got, calls = generate(model, ids, cache_implementation=cache, **options)
    assert got == plain
    assert torch.equal(calls.of_the_text(), rows_of(model, ids.repeat_interleave(3, dim=0), got))


def left_padded(ids) -> tuple[torch.Tensor, torch.Tensor]:
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[1, :9], mask[1, :9] = 1, 0
    return batch, mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 12, "cache_implementation": "static"},
        {"attention_mask": None},  # generate finds the pad ids itself
    ],
    ids=lambda options: "-".join(options) or "cached",
)
def test_greedy_text_of_a_left_padded_batch_is_that_of_the_sequences_alone(
    model, ids, greedy, options
):
    batch, mask = left_padded(ids)
    texts, calls = generate(model, batch, **{"attention_mask": mask, **options})
    short, _ = generate(model, ids[1:, 9:], use_cache=False)
    assert texts == greedy + short
    rows = calls.of_the_text()
    assert torch.equal(rows[:, :1], rows_of(model, ids[:1], texts[:1]))
    assert torch.equal(rows[:, 1:, 9:], rows_of(model, ids[1:, 9:], texts[1:]))


def test_greedy_text_after_right_padding_is_that_of_the_sequence_alone(model, ids):
    # generate() itself takes the last column, so the loop is written out.
    mask = torch.ones(1, 14, dtype=torch.int64)
    mask[0, 9:] = 0
    padded = ids[:1, :14].masked_fill(mask == 0, 1)
    cache, text = DynamicCache(config=model.config), []
    with torch.no_grad():
        last = model(padded, attention_mask=mask, past_key_values=cache).logits[:, 8]
        for position in range(9, 9 + NEW):
            token = last.argmax(-1, keepdim=True)
            text.append(int(token))
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], dim=1)
            positions = torch.tensor([[position]])
            last = model(
                token, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits[:, -1]
    assert [text] == generate(model, ids[:1, :9], use_cache=False)[0]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_continued_with_new_text_gives_the_text_of_one_prompt(model, ids, kind):
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=3 * (T + NEW))
    dialogue = ids[:, :0]
    for turn in (ids, ids.flip(1)[:, :7], ids[:, 3:4]):
        dialogue = torch.cat([dialogue, turn], dim=1)
        plain, _ = generate(model, dialogue, use_cache=False)
        text, calls = generate(model, dialogue, past_key_values=cache)
        assert text == plain
        read = rows_of(model, dialogue, text)
        assert torch.equal(torch.cat(calls.rows, dim=2), read[:, :, calls.starts[0] :])
        dialogue = torch.cat([dialogue, torch.tensor(text)], dim=1)


def test_a_left_padded_dialogue_goes_on_where_only_the_new_text_is_given(model, ids):
    batch, mask = left_padded(ids)
    cache = DynamicCache(config=model.config)
    first, _ = generate(model, batch, attention_mask=mask, past_key_values=cache)
    new = ids.flip(1)[:, :7]
    tail = torch.cat([torch.tensor(first)[:, -1:], new], dim=1)  # the last one was never read
    mask = torch.cat([mask, mask.new_ones(2, NEW + 7)], dim=1)
    got, _ = generate(model, tail, attention_mask=mask, past_key_values=cache)
    dialogues = torch.cat([batch, torch.tensor(first), new], dim=1)
    one, _ = generate(model, dialogues[:1], use_cache=False)
    other, _ = generate(model, dialogues[1:, 9:], use_cache=False)
    assert got == one + other


def test_a_prefix_is_read_once_and_continued_twice(model, ids, greedy):
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:1, :13], past_key_values=prefix)
    other = torch.cat([ids[:1, :13], ids[1:, :5]], dim=1)
    assert generate(model, ids[:1], past_key_values=copy.deepcopy(prefix))[0] == greedy
    plain, _ = generate(model, other, use_cache=False)
    assert generate(model, other, past_key_values=copy.deepcopy(prefix))[0] == plain
    assert generate(model, ids[:1], past_key_values=prefix)[0] == greedy


def test_a_prompt_of_embeddings_gives_the_text_of_its_ids(model, ids, greedy):
    batch, mask = left_padded(ids)
    short, _ = generate(model, ids[1:, 9:], use_cache=False)
    got = model.generate(
        inputs_embeds=model.model.embed_tokens(batch),
        engram_input_ids=batch,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=1,
    )
    assert got.tolist() == greedy + short


def test_guided_text_is_the_same_with_and_without_a_cache(largest, ids):
    plain, _ = generate(largest, ids[:1], guidance_scale=1.5, use_cache=False)
    assert generate(largest, ids[:1], guidance_scale=1.5)[0] == plain


def test_a_quantised_cache_rounds_attention_and_never_addresses(largest, ids):
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    text, calls = generate(largest, ids, **options)
    assert torch.equal(calls.of_the_text(), rows_of(largest, ids, text))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 5},
        {"num_beams": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: "-".join(options) or "cached",
)
def test_where_the_rule_is_cross_texts_and_rows_are_the_same_too(ids, options):
    model = trained_model(4, True, 3, boundary="cross")
    beams = {"num_beams": options.get("num_beams", 1)}
    plain, _ = generate(model, ids[:1], use_cache=False, **beams)
    text, calls = generate(model, ids[:1], **options)
    assert text == plain
    if beams == {"num_beams": 1}:
        assert_read(calls, rows_of(model, ids[:1], text))
