"""Every way of computing the same tokens gives the same logits, rows and text."""

import pytest
import torch
from tiny import VOCABULARY, tiny_model
from transformers import DynamicCache, StaticCache

# float32 through three layers: sums of a chunk are taken in another order than those of the whole.
TOLERANCE = 1e-4
SHAPES = [(1, True), (1, False), (4, True), (4, False)]
T = 23


@pytest.fixture(scope="module", params=SHAPES, ids=lambda p: f"streams{p[0]}-conv{p[1]}")
def model(request):
    return tiny_model(*request.param)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (2, T), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def whole(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@torch.no_grad()
def in_chunks(model, ids, sizes, cache=None) -> tuple[torch.Tensor, DynamicCache]:
    cache, parts, start = cache or DynamicCache(config=model.config), [], 0
    for size in sizes:
        part = model(ids[:, start : start + size], past_key_values=cache)
        parts.append(part.logits)
        start += size
    return torch.cat(parts, dim=1), cache


def test_memory_matters_to_these_models(model, ids, whole):
    with torch.no_grad(), model.model.without_memory():
        bare = model(ids).logits
    assert (bare - whole).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "sizes", [[1] * T, [5, 1, 17], [2, 21], [22, 1], [3] * 7 + [2]], ids=lambda s: str(s[:3])
)
def test_tokens_one_by_one_and_in_chunks_equal_the_whole(model, ids, whole, sizes):
    logits, _ = in_chunks(model, ids, sizes)
    assert (logits - whole).abs().max() < TOLERANCE


def test_a_cache_made_without_a_config_and_a_static_one_work_too(model, ids, whole):
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=T)):
        logits, _ = in_chunks(model, ids, [7, 1, 15], cache)
        assert (logits - whole).abs().max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_the_sequences_alone(model, ids, whole, side):
    lengths, width = (T, 11), 30
    padded = torch.ones(2, width, dtype=torch.int64)
    mask = torch.zeros(2, width, dtype=torch.int64)
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        padded[row, place], mask[row, place] = ids[row, :length], 1
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        assert (logits[row, place] - whole[row, :length]).abs().max() < TOLERANCE


def test_a_right_padded_batch_goes_on_as_the_sequences_alone(model, ids, whole):
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, 5:12] = 0  # row 1 has 5 tokens, then padding; both go on after position 12
    tokens = ids.clone()
    tokens[1, 5:12] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, alone = DynamicCache(config=model.config), torch.cat([ids[1:, :5], ids[1:, 12:]], dim=1)
    with torch.no_grad():
        for part in (slice(0, 12), slice(12, 13), slice(13, T)):
            seen = mask[:, : part.stop]
            logits = model(
                tokens[:, part],
                attention_mask=seen,
                position_ids=positions[:, part],
                past_key_values=cache,
            ).logits
        wanted = model(alone).logits[0, 6:]
    assert (logits[0] - whole[0, 13:]).abs().max() < TOLERANCE
    assert (logits[1] - wanted).abs().max() < TOLERANCE


def test_row_numbers_are_the_same_on_every_way(model, ids):
    memory = model.model.memory
    rows = memory.start(ids).rows_LBTH
    parts = [memory.start(ids[:, t : t + 1], ids[:, :t]).rows_LBTH for t in range(T)]
    assert torch.equal(torch.cat(parts, dim=2), rows)
    padding = torch.zeros(2, T + 4, dtype=torch.bool)
    padding[:, :4] = True
    padded = torch.cat([torch.ones(2, 4, dtype=torch.int64), ids], dim=1)
    assert torch.equal(memory.start(padded, padding=padding).rows_LBTH[:, :, 4:], rows)


def generate(model, ids, **options) -> list[list[int]]:
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, **options}
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"num_beams": 1},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_greedy_text_is_the_same_with_every_cache(model, ids, options):
    plain = generate(model, ids[:1], use_cache=False)
    assert generate(model, ids[:1], **options) == plain


def test_beam_search_finds_the_same_text_with_and_without_cache(model, ids):
    options = {"num_beams": 3}
    assert generate(model, ids, **options) == generate(model, ids, **options, use_cache=False)


def test_greedy_text_of_a_left_padded_batch_equals_the_sequences_alone(model, ids):
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :9], mask[1, :9] = 1, 0
    batch = generate(model, padded, attention_mask=mask)
    assert batch == generate(model, ids[:1]) + generate(model, ids[1:, 9:])


def test_greedy_text_after_right_padding_equals_the_sequence_alone(model, ids):
    # generate() itself takes the last column, so the loop is written out.
    mask = torch.ones(1, 14, dtype=torch.int64)
    mask[0, 9:] = 0
    padded = ids[:1, :14].masked_fill(mask == 0, 1)
    cache, text = DynamicCache(config=model.config), []
    with torch.no_grad():
        last = model(padded, attention_mask=mask, past_key_values=cache).logits[:, 8]
        for position in range(9, 9 + 20):
            token = last.argmax(-1, keepdim=True)
            text.append(int(token))
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], dim=1)
            positions = torch.tensor([[position]])
            last = model(
                token, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits[:, -1]
    assert [text] == generate(model, ids[:1, :9])


def test_packed_documents_equal_the_documents_alone(model, ids, whole):
    packed = torch.cat([ids[:1, :9], ids[1:, :14]], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    with torch.no_grad():
        logits = model(packed, position_ids=positions, use_cache=False).logits[0]
    assert (logits[:9] - whole[0, :9]).abs().max() < TOLERANCE
    assert (logits[9:] - whole[1, :14]).abs().max() < TOLERANCE


@pytest.mark.parametrize("taken_back", range(1, 13))
def test_a_recorded_cache_can_be_cropped_and_continued(model, ids, whole, taken_back):
    cache = DynamicCache(config=model.config)
    _, cache = in_chunks(model, ids[:, :3], [3], cache)
    cache.activate_past_recording()
    in_chunks(model, ids[:, 3:17].flip(1), [1, 13], cache)
    cache.crop(-14)
    in_chunks(model, ids[:, 3:17], [14], cache)
    cache.crop(-taken_back)
    logits, _ = in_chunks(model, ids[:, 17 - taken_back :], [6 + taken_back], cache)
    assert (logits - whole[:, 17 - taken_back :]).abs().max() < TOLERANCE


def test_a_cache_without_a_record_refuses_to_be_cropped(model, ids):
    _, cache = in_chunks(model, ids, [T])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)


def test_sequences_of_a_cache_can_be_selected_repeated_and_reset(model, ids, whole):
    _, cache = in_chunks(model, ids[:, :12], [12])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    swapped = ids[[1, 0], 12:]
    logits, _ = in_chunks(model, swapped, [4, 7], cache)
    assert (logits - whole[[1, 0], 12:]).abs().max() < TOLERANCE
    cache.reset()
    logits, _ = in_chunks(model, ids, [T], cache)
    assert (logits - whole).abs().max() < TOLERANCE


def test_a_cache_of_another_model_or_batch_is_refused(model, ids):
    bare = tiny_model(memory=None)
    _, cache = in_chunks(bare, ids, [T])
    with pytest.raises(ValueError, match="without memory"):
        in_chunks(model, ids, [T], cache)
    _, cache = in_chunks(model, ids, [T])
    with pytest.raises(ValueError, match="the cache holds others"):
        in_chunks(model, ids[:1], [T], cache)


def test_image_tokens_close_the_gate_and_block_what_is_older(model, ids):
    masked = torch.zeros(2, T, dtype=torch.bool)
    masked[:, 5] = True
    changed = ids.clone()
    changed[:, 5] = 96
    gates = []
    hook = model.model.layers[0].engram.register_forward_hook(lambda m, i, o: gates.append(o[0]))
    embeds = model.model.embed_tokens(ids)
    with torch.no_grad():
        one = model(inputs_embeds=embeds, engram_input_ids=ids, masked=masked).logits
        other = model(inputs_embeds=embeds, engram_input_ids=changed, masked=masked).logits
    hook.remove()
    assert torch.equal(one, other)  # what stands at a masked position is not looked at
    if model.model.layers[0].engram.conv is None:
        assert not gates[0][:, 5].any()


def test_embeddings_need_ids_beside_them(model, ids, whole):
    embeds = model.model.embed_tokens(ids)
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, engram_input_ids=ids).logits
    assert torch.equal(logits, whole)
    with pytest.raises(ValueError, match="engram_input_ids"):
        model(inputs_embeds=embeds)


@pytest.mark.gpu
def test_decoding_on_a_gpu_equals_the_cpu(model, ids, whole):
    on_gpu = model.to("cuda")
    try:
        logits, _ = in_chunks(on_gpu, ids.cuda(), [5, 1, 17])
    finally:
        model.to("cpu")
    assert (logits.cpu() - whole).abs().max() < 10 * TOLERANCE  # another library's matrix products
