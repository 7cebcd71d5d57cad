"""Carries our decoding state through the cache that transformers passes around."""

from collections.abc import Collection

import torch
from transformers.cache_utils import Cache, DummyLayer, EncoderDecoderCache

from engram_lm.errors import MismatchError
from engram_lm.memory.state import DecodingState


class StateLayer(DummyLayer):
    """One more layer at the end of a cache, so that whatever happens to the cache happens to our
    state.

    Not the `hybrid` layer type: other families' models, which can be given a memory too, reject it.
    """

    def __init__(self, state: DecodingState, kept: str | None = None) -> None:
        super().__init__()
        self.state = state
        self.kept = kept
        """Why tokens cannot be taken back, where a layer before this one keeps what it has read."""

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
        if self.kept is not None:
            self.state.lost = True
            raise RuntimeError(f"crop: what has been read cannot be taken back ({self.kept})")
        self.state.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.state.select(indices)


class PackLayer(StateLayer):
    """The state of one memory pack, and which sequences read it."""

    def __init__(
        self, state: DecodingState, kept: str | None, name: str, on_B: torch.Tensor
    ) -> None:
        super().__init__(state, kept)
        self.name, self.on_B = name, on_B

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.on_B = self.on_B[beam_idx.to(self.on_B.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.on_B = self.on_B.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.on_B = self.on_B[indices.to(self.on_B.device)]


def begun(cache: Cache) -> bool:
    """Whether tokens have been read through this cache, by the layers' account or by ours."""
    if any(
        isinstance(layer, StateLayer) and layer.state.past is not None for layer in cache.layers
    ):
        return True
    return not torch.compiler.is_compiling() and bool(cache.get_seq_length())


def decoding_state(cache: Cache, layers: int, keep: int, kept: str | None = None) -> DecodingState:
    """The state that this cache carries; a fresh one is put behind its attention layers if none.

    kept: why the layers before it cannot take tokens back, where they cannot.
    MismatchError if the cache has already seen tokens without us, or is no decoder's cache.
    """
    _check_kind(cache)
    if len(cache.layers) > layers:
        carried = cache.layers[layers]
        if type(carried) is not StateLayer or carried.state.keep != keep:
            raise MismatchError(
                "the cache is another model's, or a copy without its memory's state (copy.deepcopy "
                "keeps it): start a new one"
            )
        return carried.state
    if cache.get_seq_length() > 0:
        raise MismatchError("the cache holds tokens of a model without memory: start a new one")
    _fill(cache, layers)
    state = DecodingState(keep)
    cache.layers.append(StateLayer(state, kept))
    return state


def pack_state(
    cache: Cache, layers: int, name: str, keep: int, on_B: torch.Tensor, kept: str | None
) -> DecodingState:
    """The state of a memory pack, behind that of the model's own memory.

    on_B: bool, which sequences read the pack. kept: as for decoding_state. MismatchError if the
    cache has seen tokens with another choice.
    """
    _check_kind(cache)
    for carried in cache.layers[layers:]:
        if isinstance(carried, PackLayer) and carried.name == name:
            if not torch.equal(carried.on_B, on_B):
                raise MismatchError(f"packs: the cache was begun with {name!r} for other sequences")
            return carried.state
    if cache.get_seq_length() > 0:
        raise MismatchError(f"packs: the cache was begun without {name!r}: start a new one")
    _fill(cache, layers)
    state = DecodingState(keep)
    cache.layers.append(PackLayer(state, kept, name, on_B))
    return state


def forget_state(cache: Cache, layers: int) -> None:
    """Takes our state out of a cache that goes on without memory, so that nobody trusts it."""
    if isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache):
        del cache.layers[layers:]


def forget_packs(cache: Cache, names: Collection[str]) -> None:
    """The same for memory packs but these."""
    cache.layers[:] = [
        layer for layer in cache.layers if not isinstance(layer, PackLayer) or layer.name in names
    ]


def _check_kind(cache: Cache) -> None:
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise MismatchError(
            f"past_key_values: a {type(cache).__name__} cannot carry a memory's state; accepted "
            "are DynamicCache, StaticCache and QuantizedCache"
        )


def _fill(cache: Cache, layers: int) -> None:
    while len(cache.layers) < layers:  # a DynamicCache made without a config grows as it is used
        assert cache.layer_class_to_replicate is not None
        cache.layers.append(cache.layer_class_to_replicate())
