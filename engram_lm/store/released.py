"""Memories of released models, by their own configuration keys and tensor names.

In: a directory as DeepSeek-V4.1 or Qwen4-Exp is published (config.json, safetensors in one file or
in shards). Out: a MemoryConfig, a Fuse with its weights, and the rows of each table.

Shapes: V rows, E values per row, S streams, D width, M memory width, K taps of the convolution.
"""

import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram_lm.errors import ConfigError, DataError, MismatchError, instance
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.rows import RowFormat, RowStore, TensorScale
from engram_lm.store.dequantize import PLAIN, block_size, dequantize_blocks, dequantized
from engram_lm.store.disk import Disk
from engram_lm.store.header import Entry, Header, read_header
from engram_lm.store.memory_names import INPUT_SCALES, WEIGHT_SCALES, MemoryNames
from engram_lm.store.region import Region, stamp
from engram_lm.store.released_config import deepseek_memory, key, qwen_memory, read_json
from engram_lm.store.resident import Resident
from engram_lm.store.weights import INDEX, weight_files

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Of a table's values, by their names in a safetensors header."""
WKV_BLOCK = 32
"""Rows and columns of `wkv.weight` that share one scale in DeepSeek-V4.1."""


class Released:
    """The memory of one published checkpoint. Nothing but its config and headers is read at first.

    Raises DataError for files that are missing or damaged, ConfigError for a family or a value that
    is not known, MismatchError where constants stored beside the weights are not those of the
    specification. A tensor of a layer's memory that is not known is refused by name (DataError)
    when the layer is first read.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        instance("directory", directory, str, os.PathLike)
        self.directory = Path(directory)
        record = read_json(self.directory / "config.json")
        text = record.get("text_config", record)
        if "engram_layer_ids" in text:
            self.family = "deepseek-v4.1"
            self.memory, self.streams = deepseek_memory(text), int(key(text, "hc_mult"))
        elif text.get("ple_layer_ids"):
            self.family = "qwen4-exp"
            self.memory, self.streams = qwen_memory(text), int(text.get("hc_count", 4))
        else:
            raise ConfigError(
                f"{self.directory}: config.json has neither engram_layer_ids (DeepSeek-V4.1) nor "
                "ple_layer_ids (Qwen4-Exp)"
            )
        self.width = int(key(text, "hidden_size"))
        self._block = block_size(
            record.get("quantization_config") or text.get("quantization_config")
        )
        self._canonical_ids = text.get("engram_compressed_vocab_size")
        self.token_ids = int(text.get("vocab_size") or 0)
        """The model's, which may be more than its tokenizer's; 0 where it does not say."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Zero-based."""
        return self.memory.specification.layers

    def canonical_map(self, tokenizer: Any = None) -> CanonicalMap:
        """The map of its tokenizer: of the directory's own where none is given.

        Qwen4-Exp reads raw ids and needs none. MismatchError if its size is not the released one.
        """
        vocabulary = self.memory.specification.vocabulary
        if vocabulary is not None:
            return CanonicalMap.identity(vocabulary.token_ids)
        canonical = CanonicalMap.from_tokenizer(self.directory if tokenizer is None else tokenizer)
        if canonical.canonical_ids != self._canonical_ids:
            raise MismatchError(
                f"the tokenizer has {canonical.canonical_ids} canonical ids, "
                f"engram_compressed_vocab_size is {self._canonical_ids}"
            )
        return canonical.grown(self.token_ids)

    def fuse(self, layer: int, dtype: torch.dtype = torch.float32) -> Fuse:
        """The fusion of one layer with the released weights; fp8 matrices are dequantised."""
        specification = self.memory.specification
        self._check_layer(layer)
        with torch.device("meta"):
            fuse = Fuse(
                self.streams,
                self.width,
                self.memory.memory_dim,
                self.memory.fusion,
                specification.max_order,
            )
        weights = self._wkv(layer) if self.family == "deepseek-v4.1" else self._ple(layer)
        for name, parameter in fuse.named_parameters():
            if weights[name].numel() != parameter.numel():
                raise MismatchError(
                    f"layer {layer}: {name} has {weights[name].numel()} values, the "
                    f"configuration gives it shape {tuple(parameter.shape)}"
                )
            if weights[name].dim() > 1 and weights[name].shape[-1] != parameter.shape[-1]:
                raise MismatchError(
                    f"layer {layer}: {name} is stored with shape {tuple(weights[name].shape)}, the "
                    f"configuration gives it {tuple(parameter.shape)}"
                )
            weights[name] = weights[name].reshape(parameter.shape).to(dtype).contiguous()
        fuse.load_state_dict(weights, assign=True)
        return fuse

    def table(self, layer: int, where: Literal["memory", "disk"] = "memory") -> RowStore:
        """All rows of one layer's table, values and scales side by side.

        In memory that costs the table's size (94 GiB for a layer of DeepSeek-V4.1-Flash). On disk
        rows are read from the released files as they are, when they are asked for.
        """
        if where not in ("memory", "disk"):
            raise ConfigError(f"where={where!r}: 'memory' or 'disk'")
        headers: dict[Path, _Stamped] = {}
        disk = Disk(*self._parts(layer, headers))
        if any(stamp(path) != stamped.stamp for path, stamped in headers.items()):
            disk.close()
            raise DataError(f"{self.directory}: a file was replaced while it was being opened")
        if where == "disk":
            return disk
        with disk:
            return Resident.of(disk)

    def parts(self, layer: int) -> tuple[RowFormat, list[list[Region]]]:
        """How rows of one layer's table are written, and where: lists that stand side by side, of
        regions that follow each other."""
        return self._parts(layer, {})

    def _parts(
        self, layer: int, headers: dict[Path, "_Stamped"]
    ) -> tuple[RowFormat, list[list[Region]]]:
        self._check_layer(layer)
        prefix = f"layers.{layer}."
        if self.family == "deepseek-v4.1":
            values, value = self._place([prefix + "engram.embed.weight"], headers)
            scales, scale = self._place([prefix + "engram.embed.scale"], headers)
            dim, scales_dim = value.shape[1], scale.shape[1]
            if not scales_dim or dim % scales_dim or scale.dtype not in ("F8_E8M0", "U8"):
                raise MismatchError(
                    f"layer {layer}: {scales_dim} {scale.dtype} scales for rows of {dim} values: "
                    "one e8m0 for each equal group is needed"
                )
            dtype = _dtype(prefix + "engram.embed.weight", value)
            format = RowFormat(dtype=dtype, dim=dim, scale_group=dim // scales_dim)
            parts = [values, scales]
        else:
            table = prefix + "ple.ple_embedding.ngram_embedding"
            shards = self._stored.shards(table)
            values, value = self._place(shards, headers)
            format = RowFormat(
                dtype=_dtype(shards[0], value),
                dim=value.shape[1],
                tensor_scale=self._tensor_scale(table, value),
            )
            parts = [values]
        stored = sum(region.rows for region in values)
        rows = self.memory.specification.table_rows(layer)
        if (stored, format.dim) != (rows, self.memory.head_dim):
            raise MismatchError(
                f"layer {layer}: the table has {stored} rows of {format.dim}, "
                f"the specification {rows} of {self.memory.head_dim}"
            )
        return format, parts

    def _tensor_scale(self, table: str, entry: Entry) -> TensorScale | None:
        """The one scale of an fp8 table (Qwen3.8-Flash-Next-FP8)."""
        suffix, quantised = f"{table}.weight_scale", entry.dtype == "F8_E4M3"
        if not self._stored.there(suffix) and not quantised:
            return None
        if not self._stored.there(suffix):
            raise DataError(f"{self.directory}: {table} is {entry.dtype}, and there is no {suffix}")
        name = self._stored.name(suffix)
        if not quantised:
            raise MismatchError(f"{name} scales a table of {entry.dtype}: one of F8_E4M3 has one")
        shape, stored = self._look(suffix)  # one a row would be a gigabyte
        if math.prod(shape) != 1 or stored not in ("BF16", "F32"):
            raise MismatchError(
                f"{name} is {stored} of shape {shape}: one BF16 or F32 for the whole table can be "
                "read"
            )
        scale = self._tensor(suffix)
        if not 0 < float(scale) < math.inf:
            raise MismatchError(f"{name} holds {float(scale)}: a finite scale above 0 is needed")
        return TensorScale(float(scale), scale.dtype)

    def _projection(self, prefix: str) -> Tensor:
        """A weight as it is, or of fp8 its values times their scales."""
        name, weight = self._stored.name(f"{prefix}.weight"), self._tensor(f"{prefix}.weight")
        scales, inputs = (
            [scale for each in names if self._stored.there(scale := f"{prefix}.{each}")]
            for names in (WEIGHT_SCALES, INPUT_SCALES)
        )
        if weight.dtype != torch.float8_e4m3fn:
            for scale in (*scales, *inputs):
                raise MismatchError(f"{self._stored.name(scale)} scales a weight of {weight.dtype}")
            return _plain(name, weight)
        if len(scales) != 1:
            raise DataError(
                f"{self.directory}: {name} is fp8 and has {len(scales)} scales"
                f"{''.join(f', {each}' for each in scales)}: one tensor of them is needed"
            )
        if weight.dim() != 2:
            raise MismatchError(f"{name} has shape {tuple(weight.shape)}: a matrix is needed")
        values = self._tensor(scales[0])
        try:
            if self.family == "deepseek-v4.1":
                return dequantize_blocks(weight, values, WKV_BLOCK).bfloat16()
            return dequantized(weight, values, self._block)
        except MismatchError as error:
            raise MismatchError(f"{self._stored.name(scales[0])}: {error}") from error

    def _wkv(self, layer: int) -> dict[str, Tensor]:
        prefix = f"layers.{layer}.engram."
        return {
            "kv.weight": self._projection(prefix + "wkv"),
            "query_norm_weight": self._floats(prefix + "q_weight"),
            "key_norm_weight": self._floats(prefix + "k_weight"),
        }

    def _ple(self, layer: int) -> dict[str, Tensor]:
        prefix = f"layers.{layer}.ple."
        keys, value = (self._projection(f"{prefix}{name}_proj") for name in ("key", "value"))
        for name, weight, rows in (
            ("key", keys, self.streams * self.width),
            ("value", value, self.width),
        ):
            if weight.shape != (rows, self.memory.memory_dim):
                raise MismatchError(
                    f"layer {layer}: {name}_proj has shape {tuple(weight.shape)}, the "
                    f"configuration gives it {(rows, self.memory.memory_dim)}"
                )
        weights = {"kv.weight": torch.cat([keys, value])}
        for ours, theirs in (
            ("query_norm_weight", "norm_query"),
            ("key_norm_weight", "norm_key"),
            ("conv.norm_weight", "norm_conv"),
            ("conv.weight", "conv1d"),
        ):
            weights[ours] = self._floats(f"{prefix}{theirs}.weight")
        return weights

    def _place(
        self, suffixes: Sequence[str], headers: dict[Path, "_Stamped"]
    ) -> tuple[list[Region], Entry]:
        """Where matrices that stand one below the other are, and the first one's entry.

        headers: those that have been read. A table may be a thousand shards in a few files.
        """
        regions: list[Region] = []
        entries: list[Entry] = []
        for suffix in suffixes:
            name = self._stored.name(suffix)
            path = self._files[name]
            if path not in headers:
                headers[path] = _Stamped(stamp(path), read_header(path))
            entry = headers[path].header.tensors.get(name)
            if entry is None:
                raise DataError(f"{path}: no tensor {name}, which {INDEX} promises there")
            if len(entry.shape) != 2:
                raise MismatchError(f"{path}: {name} has shape {entry.shape}: a matrix is needed")
            entries.append(entry)
            if (entry.dtype, entry.shape[1]) != (entries[0].dtype, entries[0].shape[1]):
                raise MismatchError(f"{path}: {name} is {entry}, the shard before {entries[0]}")
            rows, row_bytes = entry.shape[0], entry.size // max(1, entry.shape[0])
            regions.append(Region(path=path, offset=entry.offset, rows=rows, row_bytes=row_bytes))
        return regions, entries[0]

    def _check_layer(self, layer: int) -> None:
        if layer not in self.layers:
            raise ConfigError(f"layer={layer}: this memory has layers {self.layers} (zero-based)")
        self._stored.check(layer)
        if self.family == "qwen4-exp":
            self._check_constants(layer)

    def _check_constants(self, layer: int) -> None:
        specification = self.memory.specification
        for name, wanted in (
            ("layer_multipliers", specification.multipliers[layer]),
            ("ngram_heads_vocab_sizes", sum(specification.primes[layer], ())),
            ("ngram_heads_offsets", specification.offsets(layer)),
        ):
            suffix = f"layers.{layer}.ple.ple_embedding.{name}"
            if not self._stored.there(suffix):
                continue
            if (stored := self._tensor(suffix).tolist()) != list(wanted):
                raise MismatchError(
                    f"{suffix} holds {stored}, the specification gives {list(wanted)}"
                )

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        """Tensor name -> file."""
        return weight_files(self.directory)

    @cached_property
    def _stored(self) -> MemoryNames:
        part = "engram" if self.family == "deepseek-v4.1" else "ple"
        names = MemoryNames(self.directory, part, self._files)
        names.check_layers(self.layers)
        return names

    def _floats(self, suffix: str) -> Tensor:
        return _plain(self._stored.name(suffix), self._tensor(suffix))

    def _look(self, suffix: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype as they are stored."""
        name = self._stored.name(suffix)
        try:
            part = _open(self._files[name]).get_slice(name)
        except SafetensorError as error:
            raise DataError(f"{self._files[name]}: {name}: {error}") from error
        return tuple(part.get_shape()), part.get_dtype()

    def _tensor(self, suffix: str) -> Tensor:
        name = self._stored.name(suffix)
        try:
            return _open(self._files[name]).get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{self._files[name]}: {name}: {error}") from error


class _Stamped(NamedTuple):
    """A header, and what its file was before that was read."""

    stamp: tuple[int, ...]
    header: Header


def _dtype(name: str, entry: Entry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise ConfigError(
            f"{name}: a table of {entry.dtype} values: {', '.join(DTYPES)} can be read"
        )
    return DTYPES[entry.dtype]


def _plain(name: str, weight: Tensor) -> Tensor:
    if weight.dtype not in PLAIN:
        raise MismatchError(f"{name} is {weight.dtype}: float32, bfloat16 or float16 is needed")
    return weight


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: no safetensors file can be read ({error})") from error
