"""Memories of released models, by their own configuration keys and tensor names.

In: a directory as DeepSeek-V4.1 or Qwen4-Exp is published (config.json, safetensors in one file or
in shards). Out: a MemoryConfig, a Fuse with its weights, and the rows of each table.

Shapes: V rows, E values per row, S streams, D width, M memory width, K taps of the convolution.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram_lm.config import FusionConfig, MemoryConfig, deepseek_v41, qwen4_exp
from engram_lm.errors import ConfigError, DataError, MismatchError, instance
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.rows import RowFormat, RowStore
from engram_lm.store.disk import Disk
from engram_lm.store.header import Entry, Header, read_header
from engram_lm.store.region import Region
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
    specification.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        instance("directory", directory, str, os.PathLike)
        self.directory = Path(directory)
        record = _json(self.directory / "config.json")
        text = record.get("text_config", record)
        if "engram_layer_ids" in text:
            self.family = "deepseek-v4.1"
            self.memory, self.streams = _deepseek(text), int(_key(text, "hc_mult"))
        elif text.get("ple_layer_ids"):
            self.family = "qwen4-exp"
            self.memory, self.streams = _qwen(text), int(text.get("hc_count", 4))
        else:
            raise ConfigError(
                f"{self.directory}: config.json has neither engram_layer_ids (DeepSeek-V4.1) nor "
                "ple_layer_ids (Qwen4-Exp)"
            )
        self.width = int(_key(text, "hidden_size"))
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
        format, parts = self.parts(layer)
        disk = Disk(format, parts)
        if self.parts(layer) != (format, parts):
            disk.close()
            raise DataError(f"{self.directory}: a file was replaced while it was being opened")
        if where == "disk":
            return disk
        with disk:
            return Resident.of(disk)

    def parts(self, layer: int) -> tuple[RowFormat, list[list[Region]]]:
        """How rows of one layer's table are written, and where: lists that stand side by side, of
        regions that follow each other."""
        self._check_layer(layer)
        prefix = f"layers.{layer}."
        if self.family == "deepseek-v4.1":
            values, value = self._place([prefix + "engram.embed.weight"])
            scales, scale = self._place([prefix + "engram.embed.scale"])
            dim, scales_dim = value.shape[1], scale.shape[1]
            if not scales_dim or dim % scales_dim or scale.dtype not in ("F8_E8M0", "U8"):
                raise MismatchError(
                    f"layer {layer}: {scales_dim} {scale.dtype} scales for rows of {dim} values: "
                    "one e8m0 for each equal group is needed"
                )
            format = RowFormat(dtype=_dtype(value), dim=dim, scale_group=dim // scales_dim)
            parts = [values, scales]
        else:
            values, value = self._place(self._shards(prefix + "ple.ple_embedding.ngram_embedding"))
            format = RowFormat(dtype=_dtype(value), dim=value.shape[1])
            parts = [values]
        stored = sum(region.rows for region in values)
        rows = self.memory.specification.table_rows(layer)
        if (stored, format.dim) != (rows, self.memory.head_dim):
            raise MismatchError(
                f"layer {layer}: the table has {stored} rows of {format.dim}, "
                f"the specification {rows} of {self.memory.head_dim}"
            )
        return format, parts

    def _wkv(self, layer: int) -> dict[str, Tensor]:
        prefix = f"layers.{layer}.engram."
        weight = self._tensor(prefix + "wkv.weight")
        if weight.dtype == torch.float8_e4m3fn:
            weight = dequantize_blocks(weight, self._tensor(prefix + "wkv.scale"), WKV_BLOCK)
        return {
            "kv.weight": weight,
            "query_norm_weight": self._tensor(prefix + "q_weight"),
            "key_norm_weight": self._tensor(prefix + "k_weight"),
        }

    def _ple(self, layer: int) -> dict[str, Tensor]:
        prefix = f"layers.{layer}.ple."
        specification = self.memory.specification
        for name, wanted in (
            ("layer_multipliers", specification.multipliers[layer]),
            ("ngram_heads_vocab_sizes", sum(specification.primes[layer], ())),
            ("ngram_heads_offsets", specification.offsets(layer)),
        ):
            key = f"{prefix}ple_embedding.{name}"
            if self._names(key) and (stored := self._tensor(key).tolist()) != list(wanted):
                raise MismatchError(f"{key} holds {stored}, the specification gives {list(wanted)}")
        keys, value = (self._tensor(f"{prefix}{name}_proj.weight") for name in ("key", "value"))
        weights = {"kv.weight": torch.cat([keys, value])}
        for ours, theirs in (
            ("query_norm_weight", "norm_query"),
            ("key_norm_weight", "norm_key"),
            ("conv.norm_weight", "norm_conv"),
            ("conv.weight", "conv1d"),
        ):
            weights[ours] = self._tensor(f"{prefix}{theirs}.weight")
        return weights

    def _shards(self, name: str) -> list[str]:
        """Of a table that is stored whole, or as shard_0 ... shard_n one below the other."""
        if self._names(f"{name}.weight"):
            return [f"{name}.weight"]
        shards: list[str] = []
        while self._names(shard := f"{name}.shard_{len(shards)}.weight"):
            shards.append(shard)
        if not shards:
            raise DataError(f"{self.directory}: no tensor {name}.weight or {name}.shard_0.weight")
        return shards

    def _place(self, suffixes: Sequence[str]) -> tuple[list[Region], Entry]:
        """Where matrices that stand one below the other are, and the first one's entry."""
        regions: list[Region] = []
        entries: list[Entry] = []
        headers: dict[Path, Header] = {}  # a table may be a thousand shards in a few files
        for suffix in suffixes:
            name = self._name(suffix)
            path = self._files[name]
            if path not in headers:
                headers[path] = read_header(path)
            entry = headers[path].tensors.get(name)
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

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        """Tensor name -> file."""
        return weight_files(self.directory)

    def _names(self, suffix: str) -> list[str]:
        """Stored names that end so: what stands before `layers.` differs between releases."""
        return [name for name in self._files if name == suffix or name.endswith("." + suffix)]

    def _name(self, suffix: str) -> str:
        names = self._names(suffix)
        if not names:
            raise DataError(f"{self.directory}: no tensor {suffix}")
        if len(names) > 1:
            # Converted checkpoints with copies have been read in directory order before.
            raise DataError(f"{self.directory}: {suffix} is there twice, as {' and '.join(names)}")
        return names[0]

    def _tensor(self, suffix: str) -> Tensor:
        name = self._name(suffix)
        try:
            return _open(self._files[name]).get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{self._files[name]}: {name}: {error}") from error


def dequantize_blocks(weight_OI: Tensor, scale_XY: Tensor, block: int) -> Tensor:
    """fp8 values times 2^(byte - 127) of their block, (O, I) bfloat16.

    weight_OI: e4m3; scale_XY: e8m0 or its bytes, one for each block x block values, edges included.
    """
    rows, columns = weight_OI.shape
    wanted = (-(-rows // block), -(-columns // block))
    if tuple(scale_XY.shape) != wanted:
        raise MismatchError(
            f"scales of shape {tuple(scale_XY.shape)} for a {rows} x {columns} matrix: "
            f"{wanted} is needed for blocks of {block}"
        )
    scale_XY = (scale_XY.view(torch.uint8).to(torch.int32) << 23).view(torch.float32)
    scale_OI = scale_XY.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)
    return (weight_OI.float() * scale_OI[:, :columns]).bfloat16()


def _deepseek(text: Mapping[str, Any]) -> MemoryConfig:
    orders = int(_key(text, "engram_max_ngram_size")) - 1
    # DeepSeek's own inference code calls the key engram_pad_id, its config.json the other.
    pad = text["engram_pad_id"] if "engram_pad_id" in text else _key(text, "engram_pad_token_id")
    released = deepseek_v41()
    specification = replace(
        released.specification,
        layers=tuple(_key(text, "engram_layer_ids")),
        rows_per_head=(int(_key(text, "engram_vocab_size")),) * orders,
        heads=int(_key(text, "engram_n_heads")),
        pad_id=int(pad),
    )
    rows = [specification.table_rows(layer) for layer in specification.layers]
    if rows != list(_key(text, "engram_num_embeddings")):
        raise MismatchError(
            f"engram_num_embeddings={text['engram_num_embeddings']}: the primes add up to {rows}"
        )
    return MemoryConfig(
        specification=specification,
        head_dim=int(_key(text, "engram_head_dim")),
        fusion=replace(released.fusion, norm_eps=float(_key(text, "rms_norm_eps"))),
    )


def _qwen(text: Mapping[str, Any]) -> MemoryConfig:
    eos, released = _key(text, "eos_token_id"), qwen4_exp().specification
    orders = int(text.get("ngram_size", 3)) - 1
    specification = replace(
        released,
        layers=tuple(layer - 1 for layer in sorted(set(text["ple_layer_ids"]))),  # from 1 there
        rows_per_head=(int(text.get("ngram_vocab_size_base", 20_000_000)),) * orders,
        heads=int(text.get("heads_per_ngram", 8)),
        seed=int(text.get("seed", 1234)),
        pad_id=int(eos[0] if isinstance(eos, list) else eos),
        rows_multiple=int(text.get("make_ngram_vocab_size_divisible_by", 128)),
        vocabulary=None,
    ).bind(CanonicalMap.identity(int(_key(text, "vocab_size"))))
    width = int(text.get("ple_embed_dim") or _key(text, "hidden_size"))
    eps = float(text.get("rms_norm_eps", 1e-6))
    return MemoryConfig(
        specification=specification,
        head_dim=width // specification.heads_per_layer,
        fusion=FusionConfig(
            conv_kernel=int(text.get("ple_conv_kernel_size", 4)),
            norm_eps=eps,
            conv_norm_eps=eps,
            zero_centered_norms=True,
        ),
    )


def _dtype(entry: Entry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise ConfigError(f"a table of {entry.dtype} values: {', '.join(DTYPES)} can be read")
    return DTYPES[entry.dtype]


def _key(text: Mapping[str, Any], name: str) -> Any:
    if text.get(name) is None:
        raise ConfigError(f"config.json: the key {name} is missing")
    return text[name]


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: no safetensors file can be read ({error})") from error
