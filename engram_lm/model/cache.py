"""Carries our decoding state through the cache that transformers passes around."""

import torch
from transformers.cache_utils import Cache, DummyLayer

from engram_lm.memory.state import DecodingState


class StateLayer(DummyLayer):
    """One more layer at the end of a cache, so that whatever happens to the cache happens to our
    state.

    Not the `hybrid` layer type: other families' models, which can be given a memory too, reject it.
    """

    def __init__(self, state: DecodingState) -> None:
        super().__init__()
        self.state = state

    @property
    def record_past(self) -> bool:
        return self.state.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.state.recording = value

    def activate_past_recording(self) -> None:
        self.state.recording = True

    def reset(self) -> None:
        self.state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.state.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.state.select(indices)


def decoding_state(cache: Cache, layers: int, keep: int) -> DecodingState:
    """The state that this cache carries; a fresh one is put behind its attention layers if none.

    ValueError if the cache has already seen tokens without us.
    """
    if len(cache.layers) > layers:
        carried = cache.layers[layers]
        assert isinstance(carried, StateLayer)
        return carried.state
    if cache.get_seq_length() > 0:
        raise ValueError("the cache holds tokens of a model without memory: start a new one")
    while len(cache.layers) < layers:  # a DynamicCache made without a config grows as it is used
        assert cache.layer_class_to_replicate is not None
        cache.layers.append(cache.layer_class_to_replicate())
    state = DecodingState(keep)
    cache.layers.append(StateLayer(state))
    return state
