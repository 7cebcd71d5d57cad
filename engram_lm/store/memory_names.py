"""Which tensors of a released checkpoint are a memory's, by their names.

Each that lies below `layers.N.engram.` or `layers.N.ple.` is read, known to change nothing, or
refused by its name: with a scale that nobody reads, rows look right and are not.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from engram_lm.errors import DataError

WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale")
"""What releases call the scales of a projection. All of them multiply, whatever the name says."""
INPUT_SCALES = ("input_scale", "activation_scale")
"""By these an engine rounds what enters an fp8 projection; here nothing is rounded."""

_KNOWN = {
    "engram": r"embed\.(weight|scale)|wkv\.(weight|scale)|[qk]_weight",
    "ple": (
        r"ple_embedding\.ngram_embedding\.((shard_(0|[1-9]\d*)\.)?weight|weight_scale)"
        r"|ple_embedding\.(layer_multipliers|ngram_heads_vocab_sizes|ngram_heads_offsets)"
        rf"|(key|value)_proj\.(weight|{'|'.join((*WEIGHT_SCALES, *INPUT_SCALES))})"
        r"|norm_(query|key|conv)\.weight|conv1d\.weight"
    ),
}
"""What may follow: DeepSeek-V4.1's names and Qwen4-Exp's."""


class MemoryNames:
    """Names of a checkpoint's memories. part: `engram` (DeepSeek-V4.1) or `ple` (Qwen4-Exp)."""

    def __init__(self, directory: Path, part: str, names: Iterable[str]) -> None:
        self.directory, self.part = directory, part
        self._known = re.compile(_KNOWN[part])
        self._stored: dict[str, list[str]] = {}
        self._layers: dict[str, list[str]] = {}
        memory = re.compile(rf"(?:^|\.)(layers\.(\d+)\.{part}\..*)")
        for name in names:  # 152,089 in Qwen3.8-Flash-Next: each is looked at once
            if f".{part}." in name and (match := memory.search(name)):
                self._stored.setdefault(match[1], []).append(name)
                self._layers.setdefault(match[2], []).append(match[1])

    def check(self, layer: int) -> None:
        """DataError for a tensor of this layer's memory that is there twice, lies under another
        prefix than the rest, or is not known."""
        prefixes: dict[str, str] = {}
        suffixes = self._layers.get(str(layer), [])
        for suffix in suffixes:
            name = self.name(suffix)
            prefixes[name.removesuffix(suffix)] = name
            if not self._known.fullmatch(suffix.split(".", 3)[3]):
                raise DataError(
                    f"{self.directory}: {name} lies in the memory of layer {layer}, and what it "
                    "changes there is not known"
                )
        if len(prefixes) > 1:
            raise DataError(
                f"{self.directory}: the memory of layer {layer} lies under "
                f"{len(prefixes)} prefixes: {' and '.join(sorted(prefixes.values())[:2])}"
            )

    def check_layers(self, layers: Sequence[int]) -> None:
        """DataError for a memory in a layer that the configuration does not name."""
        for number, suffixes in self._layers.items():
            if int(number) not in layers:
                raise DataError(
                    f"{self.directory}: {self._stored[suffixes[0]][0]} is of a memory, and "
                    f"config.json gives one to the layers {tuple(layers)} alone (zero-based)"
                )

    def there(self, suffix: str) -> bool:
        """Whether a tensor of this name is stored: what stands before `layers.` differs."""
        return suffix in self._stored

    def name(self, suffix: str) -> str:
        """As it is stored. DataError where there is none, or two."""
        names = self._stored.get(suffix)
        if names is None:
            raise DataError(f"{self.directory}: no tensor {suffix}")
        if len(names) > 1:
            # Converted checkpoints with copies have been read in directory order before.
            raise DataError(f"{self.directory}: {suffix} is there twice, as {' and '.join(names)}")
        return names[0]

    def shards(self, suffix: str) -> list[str]:
        """Names of a table that is stored whole, or as shard_0 ... shard_n one below the other.

        DataError where there is none, one is missing among them, or the whole is there besides.
        """
        shard = re.compile(rf"{re.escape(suffix)}\.shard_(\d+)\.weight")
        numbers = sorted(int(match[1]) for each in self._stored if (match := shard.fullmatch(each)))
        whole = self.there(f"{suffix}.weight")
        if whole and numbers:
            raise DataError(
                f"{self.directory}: {suffix} is there twice, as weight and as shard_{numbers[0]}"
            )
        if not whole and not numbers:
            raise DataError(
                f"{self.directory}: no tensor {suffix}.weight or {suffix}.shard_0.weight"
            )
        for number, stored in enumerate(numbers):
            if number != stored:
                raise DataError(
                    f"{self.directory}: no tensor {suffix}.shard_{number}.weight, and there is "
                    f"shard_{numbers[-1]}"
                )
        if whole:
            return [f"{suffix}.weight"]
        return [f"{suffix}.shard_{number}.weight" for number in numbers]
