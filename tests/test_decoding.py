"""Every way of computing the same tokens gives the same logits and reads the same rows.

On trained models: 1 and 4 streams, with and without convolution, n-grams up to 3 and up to 4.
"""

import copy

import pytest
import torch
from rows_read import rows_read
from tiny import DECODERS, phrases, trained_model
from transformers import DynamicCache, StaticCache

# float32 through three layers: sums of a chunk are taken in another order than those of the whole.
TOLERANCE = 1e-4
T = 23
# The furthest that anything looks back is the convolution's 12 positions, with n-grams up to 4.
REACH = 12


@pytest.fixture(scope="module", params=DECODERS)
def model(request):
    return trained_model(*DECODERS[request.param])


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return phrases(2, T, seed=99)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def plain(model, ids, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and row numbers of the forward pass without a cache."""
    with rows_read(model) as calls:
        logits = model(ids, use_cache=False, **options).logits
    return logits, calls.of_the_text()


@pytest.fixture(scope="module")
def whole(model, ids) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return plain(model, ids)


def in_chunks(model, ids, sizes, cache=None, **options):
    """Logits, row numbers and cache of a call for every size; options are cut like the ids."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts, start = [], 0
    with rows_read(model) as calls:
        for size in sizes:
            part = slice(start, start + size)
            cut = {name: values[:, part] for name, values in options.items()}
            if (mask := options.get("attention_mask")) is not None:
                cut["attention_mask"] = mask[:, : part.stop]
            parts.append(model(ids[:, part], past_key_values=cache, **cut).logits)
            start += size
    return torch.cat(parts, dim=1), torch.cat(calls.rows, dim=2), cache


def assert_same(got, wanted, where=None) -> None:
    """Logits within TOLERANCE and equal row numbers, at the positions `where` (B, T) is True."""
    (logits, rows), (wanted_logits, wanted_rows) = got[:2], wanted[:2]
    if where is not None:
        logits, wanted_logits = logits[where], wanted_logits[where]
        rows, wanted_rows = rows[:, where], wanted_rows[:, where]
    assert torch.equal(rows, wanted_rows)
    assert (logits - wanted_logits).abs().max() < TOLERANCE


def padded_to(width: int, ids: torch.Tensor, lengths: list[int], side: str):
    """A batch of the first `length` tokens of `ids` (1, T) for each length, and its mask."""
    batch = torch.ones(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[0, :length], 1
    return batch, mask


def zeroed(model, parts: dict[torch.nn.Parameter, slice], ids) -> torch.Tensor:
    """Logits with these slices of these parameters at zero."""
    kept = {parameter: parameter[part].clone() for parameter, part in parts.items()}
    try:
        for parameter, part in parts.items():
            parameter[part] = 0
        return model(ids, use_cache=False).logits
    finally:
        for parameter, part in parts.items():
            parameter[part] = kept[parameter]


def test_memory_convolution_and_the_longest_n_grams_matter_to_these_models(model, ids, whole):
    with model.model.without_memory():
        bare = model(ids, use_cache=False).logits
    assert (bare - whole[0]).abs().max() > 1000 * TOLERANCE
    specification = model.model.addresses.specification
    longest = {
        table.weight: slice(specification.offsets(int(layer))[-specification.heads], None)
        for layer, table in model.model.tables.items()
    }
    assert (zeroed(model, longest, ids) - whole[0]).abs().max() > 1000 * TOLERANCE
    memories = [layer.engram for layer in model.model.layers if layer.engram is not None]
    convs = {e.conv.weight: slice(None) for e in memories if e.conv is not None}
    if convs:
        assert (zeroed(model, convs, ids) - whole[0]).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("size", range(1, T + 1))
def test_chunks_of_every_size_equal_the_whole(model, ids, whole, size):
    sizes = [size] * (T // size) + ([T % size] if T % size else [])
    assert_same(in_chunks(model, ids, sizes), whole)


@pytest.mark.parametrize("sizes", [[5, 1, 17], [22, 1], [1, 2, 3, 4, 5, 8]], ids=str)
def test_chunks_of_mixed_sizes_equal_the_whole(model, ids, whole, sizes):
    assert_same(in_chunks(model, ids, sizes), whole)


def test_a_cache_made_without_a_config_and_a_static_one_work_too(model, ids, whole):
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=T)):
        assert_same(in_chunks(model, ids, [7, 1, 1, 14], cache), whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_padded_by_every_amount_equal_the_sequences_alone(model, ids, whole, side):
    lengths = list(range(1, T + 1))
    batch, mask = padded_to(T, ids[:1], lengths, side)
    got, real = plain(model, batch, attention_mask=mask), mask.bool()
    for row, length in enumerate(lengths):
        alone = (whole[0][:1, :length], whole[1][:, :1, :length])
        one = real[row : row + 1]
        assert_same((got[0][row, one[0]][None], got[1][:, row, one[0]][:, None]), alone)


@pytest.mark.parametrize("positions_given", [True, False])
@pytest.mark.parametrize("sizes", [[T], [REACH, 1, 1, 4, 5], [1] * T], ids=lambda s: f"{len(s)}")
def test_left_padded_batches_in_chunks_equal_the_sequences_alone(
    model, ids, whole, sizes, positions_given
):
    # The first chunk of 12 is nothing but padding to the shortest rows.
    lengths = [T, T - 1, 17, 11, 10, 2]
    batch, mask = padded_to(T, ids[:1], lengths, "left")
    options = {"attention_mask": mask}
    if positions_given:  # as generate() makes them: 0 at padding
        options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    logits, rows, _ = in_chunks(model, batch, sizes, **options)
    for row, length in enumerate(lengths):
        got = (logits[row : row + 1, -length:], rows[:, row : row + 1, -length:])
        assert_same(got, (whole[0][:1, :length], whole[1][:, :1, :length]))


def test_batches_right_padded_by_every_amount_go_on_as_the_sequences_alone(model, ids):
    width = REACH + 2
    lengths = list(range(1, width + 1))
    batch, mask = padded_to(width, ids[:1], lengths, "right")
    more = ids[1:, :9].expand(len(lengths), -1)
    tokens = torch.cat([batch, more], dim=1)
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits, rows, _ = in_chunks(
        model, tokens, [width, 1, 1, 7], attention_mask=mask, position_ids=positions
    )
    for row, length in enumerate(lengths):
        alone = plain(model, torch.cat([ids[:1, :length], more[:1]], dim=1))
        got = (logits[row : row + 1, width:], rows[:, row : row + 1, width:])
        assert_same(got, (alone[0][:, length:], alone[1][:, :, length:]))


DOCUMENTS = [9, 1, 2, 11]


def packed(ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four documents in a row, their positions, and where each attends to (1, 1, W, W)."""
    parts = [ids[i % 2 : i % 2 + 1, :length] for i, length in enumerate(DOCUMENTS)]
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(DOCUMENTS))
    sees = (number[:, None] == number) & torch.ones(sum(DOCUMENTS), sum(DOCUMENTS)).tril().bool()
    return torch.cat(parts, dim=1), positions, sees[None, None]


def alone(model, ids) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [plain(model, ids[i % 2 : i % 2 + 1, :n]) for i, n in enumerate(DOCUMENTS)]
    return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=2)


def test_packed_documents_equal_the_documents_alone(model, ids):
    row, positions, sees = packed(ids)
    assert_same(plain(model, row, position_ids=positions), alone(model, ids))
    assert_same(plain(model, row, position_ids=positions, attention_mask=sees), alone(model, ids))


def test_documents_cut_out_of_longer_ones_are_told_by_a_jump_of_positions(model, ids):
    row, positions, _ = packed(ids)
    later = positions + torch.repeat_interleave(
        torch.tensor([0, 40, 90, 140]), torch.tensor(DOCUMENTS)
    )
    assert_same(plain(model, row, position_ids=later), alone(model, ids))


@pytest.mark.parametrize("sizes", [[9, 14], [4, 6, 1, 12], [1] * T], ids=str)
def test_packed_documents_in_chunks_equal_the_documents_alone(model, ids, sizes):
    row, positions, sees = packed(ids)
    cache, parts, start = DynamicCache(config=model.config), [], 0
    with rows_read(model) as calls:
        for stop in torch.tensor(sizes).cumsum(0).tolist():
            output = model(
                row[:, start:stop],
                position_ids=positions[:, start:stop],
                attention_mask=sees[:, :, start:stop, :stop],
                past_key_values=cache,
            )
            parts.append(output.logits)
            start = stop
    assert_same((torch.cat(parts, dim=1), calls.of_the_text()), alone(model, ids))


@pytest.mark.parametrize("taken_back", range(1, 13))
def test_a_recorded_cache_can_be_rolled_back_and_continued(model, ids, whole, taken_back):
    _, _, cache = in_chunks(model, ids[:, :3], [3])
    cache.activate_past_recording()
    in_chunks(model, ids[:, 3:17].flip(1), [1, 13], cache)
    cache.crop(-14)
    in_chunks(model, ids[:, 3:17], [14], cache)
    cache.crop(-taken_back)
    first = 17 - taken_back
    got = in_chunks(model, ids[:, first:], [1, T - first - 1], cache)
    assert_same(got, (whole[0][:, first:], whole[1][:, :, first:]))


@pytest.mark.parametrize("taken_back", range(1, 13))
def test_a_left_padded_batch_can_be_rolled_back_and_continued(model, ids, whole, taken_back):
    lengths = [T, 14, 9]
    batch, mask = padded_to(T, ids[:1], lengths, "left")
    _, _, cache = in_chunks(model, batch[:, :7], [7], attention_mask=mask)
    cache.activate_past_recording()
    model(batch[:, 7:20], attention_mask=mask[:, :20], past_key_values=cache)
    cache.crop(-taken_back)
    got = model(batch[:, 20 - taken_back :], attention_mask=mask, past_key_values=cache).logits
    for row, length in enumerate(lengths):
        tokens = min(length, 3 + taken_back)
        wanted = whole[0][0, length - tokens : length]
        assert (got[row, -tokens:] - wanted).abs().max() < TOLERANCE


def test_sequences_of_a_cache_can_be_selected_repeated_reordered_and_reset(model, ids, whole):
    _, _, cache = in_chunks(model, ids[:, :12], [12])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([True, True, False, True]))
    order = [1, 0, 1]
    got = in_chunks(model, ids[order, 12:], [1, 3, 7], cache)
    assert_same(got, (whole[0][order, 12:], whole[1][:, order, 12:]))
    cache.reset()
    assert_same(in_chunks(model, ids, [T], cache), whole)


def test_two_continuations_of_a_copied_cache_do_not_touch_each_other(model, ids, whole):
    _, _, prefix = in_chunks(model, ids[:, :12], [11, 1])
    other = copy.deepcopy(prefix)
    in_chunks(model, ids[:, 12:].flip(1), [1, 10], other)
    got = in_chunks(model, ids[:, 12:], [1, 10], copy.deepcopy(prefix))
    assert_same(got, (whole[0][:, 12:], whole[1][:, :, 12:]))
    got = in_chunks(model, ids[:, 12:], [11], prefix)
    assert_same(got, (whole[0][:, 12:], whole[1][:, :, 12:]))


def test_what_a_cache_remembers_stays_at_one_address(model, ids, whole):
    cache = DynamicCache(config=model.config)
    places = []
    for t in range(T):
        model(ids[:, t : t + 1], past_key_values=cache)
        state = cache.layers[-1].state
        places.append([state.past.ids_BW.data_ptr(), *(v.data_ptr() for v in state.tails.values())])
    assert all(place == places[0] for place in places)


def test_a_cache_filled_in_inference_mode_can_be_continued_outside(model, ids, whole):
    with torch.inference_mode():
        _, _, cache = in_chunks(model, ids[:, :12], [11, 1])
    got = in_chunks(model, ids[:, 12:], [1, 10], cache)
    assert_same(got, (whole[0][:, 12:], whole[1][:, :, 12:]))


@pytest.mark.parametrize("sizes", [[T], [1] * T, [5, 18]], ids=lambda s: f"{len(s)}")
def test_where_the_rule_is_cross_n_grams_and_convolution_reach_over_boundaries(ids, sizes):
    model = trained_model(4, True, 3, boundary="cross")
    row, positions, _ = packed(ids)
    text = plain(model, row)
    assert torch.equal(plain(model, row, position_ids=positions)[1], text[1])
    assert_same(in_chunks(model, row, sizes), text)
    lengths = [T, 9]
    batch, mask = padded_to(T, row, lengths, "left")
    logits, rows, _ = in_chunks(model, batch, sizes, attention_mask=mask)
    assert_same((logits[1:, -9:], rows[:, 1:, -9:]), (text[0][:, :9], text[1][:, :, :9]))


def test_image_tokens_close_the_gate_and_block_what_is_older(model, ids):
    masked = torch.zeros(2, T, dtype=torch.bool)
    masked[:, 5] = True
    changed = ids.clone()
    changed[:, 5] = 96
    gates = []
    hook = model.model.layers[0].engram.register_forward_hook(lambda m, i, o: gates.append(o[0]))
    embeds = model.model.embed_tokens(ids)
    one = model(inputs_embeds=embeds, engram_input_ids=ids, masked=masked).logits
    other = model(inputs_embeds=embeds, engram_input_ids=changed, masked=masked).logits
    hook.remove()
    assert torch.equal(one, other)  # what stands at a masked position is not looked at
    if model.model.layers[0].engram.conv is None:
        assert not gates[0][:, 5].any()


def test_embeddings_need_ids_beside_them(model, ids, whole):
    embeds = model.model.embed_tokens(ids)
    logits = model(inputs_embeds=embeds, engram_input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, whole[0])
    with pytest.raises(ValueError, match="engram_input_ids"):
        model(inputs_embeds=embeds)


@pytest.mark.gpu
def test_decoding_on_a_gpu_equals_the_cpu(model, ids, whole):
    on_gpu = model.to("cuda")
    try:
        logits, rows, _ = in_chunks(on_gpu, ids.cuda(), [5, 1, 17])
    finally:
        model.to("cpu")
    assert torch.equal(rows.cpu(), whole[1])
    assert (logits.cpu() - whole[0]).abs().max() < 10 * TOLERANCE  # other matrix products
