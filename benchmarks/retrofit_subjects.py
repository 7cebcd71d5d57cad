"""Models to be asked: one of transformers as it is, with our memory, with engram-peft's.

Shapes: B sequences, T tokens. Both retrofits have the same rows, dimensions, heads and weights, so
that they compute the same function of the rows that they read. Models are the small random ones of
tests/families.py, with a memory as after training.
"""

import copy
import importlib
import sys
import typing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typing_extensions
from torch import Tensor
from transformers import AutoModelForCausalLM

import engram_lm
from engram_lm import CanonicalMap, MemoryConfig, Specification
from engram_lm.memory.fuse import Fuse

sys.path.append(str(Path(__file__).parents[1] / "tests"))
families: Any = importlib.import_module("families")

VOCABULARY, NEW, PAD = 97, 12, 1
MEMORY = MemoryConfig(
    specification=Specification(
        layers=(0, 2),
        rows_per_head=(50, 50),
        heads=2,
        pad_id=PAD,
        canonical_rule="raw",
        boundary_rule="document",
    ),
    head_dim=8,
)
INSTALL = "pip install --target DIR --no-deps engram-peft==1.2.7 jaxtyping wadler-lindig"


def find_peft(directory: Path) -> None:
    """SystemExit where engram-peft, or what it imports, is not installed there."""
    for name in ("engram_peft", "jaxtyping", "wadler_lindig"):
        if not (directory / name).is_dir():
            raise SystemExit(f"--peft {directory}: no {name} there; make it with `{INSTALL}`")


def load_peft(directory: Path) -> Any:
    """engram-peft from where it was installed. Under Python 3.11 it lacks `typing.override`."""
    find_peft(directory)
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override  # type: ignore[attr-defined,unused-ignore]
    sys.path.append(str(directory))
    return importlib.import_module("engram_peft")


def peft_config(peft: Any, memory: MemoryConfig, **changes: Any) -> Any:
    """engram-peft's configuration of the same memory: one branch, rows in all heads of an order."""
    specification = memory.specification
    return peft.EngramConfig(
        engram_vocab_size_per_ngram=[r * specification.heads for r in specification.rows_per_head],
        n_head_per_ngram=specification.heads,
        embedding_dim=memory.memory_dim,
        target_layers=list(specification.layers),
        hc_mult=1,
        conv_kernel_size=memory.fusion.conv_kernel,
        pad_id=specification.pad_id,
        seed=specification.seed,
        **changes,
    )


class Bare:
    """A model of transformers as it is."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model: Any = families.bare(family)
        self.config = self.model.config

    def fresh(self) -> None:
        """Before a new text."""

    def logits(self, ids_BT: Tensor, **options: Any) -> Tensor:
        """Of the plain forward pass."""
        self.fresh()
        return self.model(input_ids=ids_BT, use_cache=False, **options).logits

    def text(self, ids_BT: Tensor, **options: Any) -> list[list[int]]:
        """Greedy but for what the options say; new ids only."""
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options}
        options.setdefault("attention_mask", torch.ones_like(ids_BT))
        made = self.model.generate(input_ids=ids_BT, **options)
        return made[:, ids_BT.shape[1] :].tolist()

    def beside(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """What a prompt's embeddings are given beside them."""
        return {}

    def reloaded(self, directory: Path) -> Any:
        """Logits come from what was saved."""
        self.model.save_pretrained(directory)
        other = copy.copy(self)
        other.model = AutoModelForCausalLM.from_pretrained(directory)
        return other


class Ours(Bare):
    """With a memory of ours, trained or not."""

    def __init__(self, family: str, trained: bool = True) -> None:
        super().__init__(family)
        engram_lm.attach(self.model, CanonicalMap.identity(VOCABULARY), MEMORY)
        if trained:
            families.speak(self.model)

    def beside(self, ids_BT: Tensor) -> dict[str, Tensor]:
        return {"engram_input_ids": ids_BT}


class Peft(Bare):
    """With engram-peft's, of the weights that ours has, its convolution left out or not."""

    def __init__(self, peft: Any, family: str, ours: Ours | None = None, conv: bool = True) -> None:
        super().__init__(family)
        self.peft = peft
        config = peft_config(peft, MEMORY, enable_tokenizer_compression=False)
        self.model = peft.get_engram_model(self.model, config).eval()
        if ours is not None:
            decoder = ours.model.base_model
            for layer in MEMORY.specification.layers:
                theirs = self.model.engram_layers[str(layer)]
                rows = decoder.tables[str(layer)].weight
                theirs.multi_head_embedding.embedding.weight.copy_(rows)
                give(decoder.get_submodule(f"layers.{layer}.engram"), theirs)
                if not conv:
                    theirs.short_conv.conv.weight.zero_()

    def logits_at(self, ours: Ours, ids_BT: Tensor) -> Tensor:
        """Of the plain pass, with rows at our addresses: its own multiply an n-gram's tokens in
        the other order."""
        specification = MEMORY.specification
        rows_LBTH = ours.model.base_model.addresses.rows(ids_BT)
        local = {
            layer: (rows_BTH - torch.tensor(specification.offsets(layer))).numpy()
            for layer, rows_BTH in zip(MEMORY.specification.layers, rows_LBTH, strict=True)
        }
        with patch.object(self.model.hash_mapping, "hash", lambda _: local):
            return self.logits(ids_BT)

    def fresh(self) -> None:
        """Its buffer of tokens would go on from one text into the next that begins with one."""
        self.model._inference_token_buffer = None

    def beside(self, ids_BT: Tensor) -> dict[str, Tensor]:
        hashes = self.model.hash_mapping.hash(ids_BT)
        stacked = [torch.from_numpy(hashes[layer]) for layer in MEMORY.specification.layers]
        return {"engram_hash_indices": torch.stack(stacked, dim=2)}

    def reloaded(self, directory: Path) -> Any:
        self.model.save_pretrained(str(directory))
        other = copy.copy(self)
        bare = families.bare(self.family)
        other.model = self.peft.EngramModel.from_pretrained(bare, str(directory)).eval()
        return other


def give(fuse: Fuse, theirs: Any) -> None:
    """Our module's weights to engram-peft's."""
    key, value = fuse.kv.weight.split(fuse.width)
    theirs.gating.w_k[0].weight.copy_(key)
    theirs.gating.w_v.weight.copy_(value)
    theirs.gating.norm_h[0].weight.copy_(fuse.query_norm_weight[0])
    theirs.gating.norm_k[0].weight.copy_(fuse.key_norm_weight[0])
    assert fuse.conv is not None
    theirs.short_conv.norms[0].weight.copy_(fuse.conv.norm_weight[0])
    theirs.short_conv.conv.weight.copy_(fuse.conv.weight[0, :, None])
