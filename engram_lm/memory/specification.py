"""How token ids become row numbers: the rules, the constants they give, and their file format.

A `Specification` states rules only. `bind` adds the vocabulary it is used with, and from then on
the multipliers exist too, because they depend on the number of canonical ids. Two engines that hold
equal specifications read equal rows; `digest` is what a checkpoint records to say so.

Source: section 2.2 of arXiv 2601.07372, its public demo, DeepSeek-V4.1 and Qwen4-Exp.
docs/addressing.md says all of it in words.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sympy import nextprime

from engram_lm import whole
from engram_lm.errors import (
    ConfigError,
    MismatchError,
    instance,
    shown,
    whole_number,
    whole_numbers,
)
from engram_lm.memory.canonical import CanonicalMap, backend_of, vocabulary_size

FORMAT = "engram-specification"
VERSION = 2
INT64_MAX = 2**63 - 1
UINT64_MAX = 2**64 - 1

# Each rule is one line of a table, so that a file of a later version fails by name and not by a
# wrong row.
CANONICAL_RULES = ("folded", "raw")
MULTIPLIER_RULES = ("pcg64", "splitmix64")
PRIME_RULES = ("distinct",)
BOUNDARY_RULES = ("cross", "document", "eos")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The facts of a canonical map that addressing depends on."""

    token_ids: int
    canonical_ids: int
    sha256: str
    """Of the map as little-endian int32."""

    def __post_init__(self) -> None:
        for name in ("token_ids", "canonical_ids"):
            value = whole_number(f"vocabulary.{name}", getattr(self, name), least=1)
            object.__setattr__(self, name, value)
        instance("vocabulary.sha256", self.sha256, str)


@dataclass(frozen=True, kw_only=True)
class Specification:
    """Which rows an n-gram reads, in every layer, order and head. Raises ConfigError.

    canonical_rule `folded`: tokens that differ in case, accents or white space share a canonical
    id; `raw`: the token id is the canonical id (Qwen4-Exp).
    multiplier_rule: odd multipliers, bounded so that canonical id * multiplier stays below 2^63.
    `pcg64`: from numpy's default_rng(seed + 10007 * layer) (demo, DeepSeek-V4.1); `splitmix64`:
    from SplitMix64 at seed + 10007 * the layer's place among `layers` (Qwen4-Exp).
    prime_rule `distinct`: the next primes from rows_per_head on that no earlier layer, order or
    head has. boundary_rule `cross`: n-grams run across document starts (demo); `document`: they
    stop there (DeepSeek-V4.1); `eos`: they stop behind every pad_id, which is the EOS (Qwen4-Exp).
    """

    layers: tuple[int, ...]
    """Zero-based, ascending."""
    rows_per_head: tuple[int, ...]
    """Rows asked for, one entry for each order from 2 up; each head gets the next free prime."""
    heads: int
    """Per order."""
    seed: int = 0
    pad_id: int
    """The token id whose canonical id stands before the start of a text: the tokenizer's
    pad_token_id, or its eos_token_id where it has no pad token."""
    rows_multiple: int = 1
    """A table's rows are rounded up to a multiple of it; no n-gram reads the rows added."""
    canonical_rule: str = "folded"
    multiplier_rule: str = "pcg64"
    prime_rule: str = "distinct"
    boundary_rule: str = "cross"
    vocabulary: Vocabulary | None = None

    def __post_init__(self) -> None:
        if self.pad_id is None:
            raise ConfigError(
                "pad_id=None: a token id is needed, the tokenizer's pad_token_id or, where it has "
                "none, its eos_token_id"
            )
        for field in ("layers", "rows_per_head"):
            object.__setattr__(self, field, whole_numbers(field, getattr(self, field)))
        for field in ("heads", "seed", "pad_id", "rows_multiple"):
            object.__setattr__(self, field, whole_number(field, getattr(self, field)))
        instance("vocabulary", self.vocabulary, Vocabulary, type(None))
        if not self.layers or any(layer < 0 for layer in self.layers):
            raise ConfigError(
                f"layers={self.layers}: at least one zero-based layer number is needed"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"layers={self.layers}: layer numbers must ascend and not repeat")
        if not self.rows_per_head:
            raise ConfigError("rows_per_head=(): one entry for each order from 2 up is needed")
        if any(not 1 < rows < 2**48 for rows in self.rows_per_head):
            raise ConfigError(f"rows_per_head={self.rows_per_head}: 2 up to 2^48 rows a head")
        if self.heads < 1:
            raise ConfigError(f"heads={self.heads}: at least 1 head per order")
        if not 0 <= self.seed <= INT64_MAX:
            raise ConfigError(f"seed={self.seed}: a seed lies between 0 and 2^63 - 1")
        if self.rows_multiple < 1:
            raise ConfigError(f"rows_multiple={self.rows_multiple}: 1 or more")
        for field, accepted in (
            ("canonical_rule", CANONICAL_RULES),
            ("multiplier_rule", MULTIPLIER_RULES),
            ("prime_rule", PRIME_RULES),
            ("boundary_rule", BOUNDARY_RULES),
        ):
            if getattr(self, field) not in accepted:
                raise ConfigError(
                    f"{field}={shown(getattr(self, field))}: accepted are {', '.join(accepted)}"
                )
        if self.vocabulary is not None and not 0 < self.vocabulary.canonical_ids < 2**30:
            # From there on numpy draws multipliers 32 bits at a time: another stream.
            raise ConfigError(f"canonical_ids={self.vocabulary.canonical_ids}: 1 to 2^30 - 1")
        limit = 2**31 if self.vocabulary is None else self.vocabulary.token_ids
        if not 0 <= self.pad_id < limit:
            raise ConfigError(f"pad_id={self.pad_id}: a token id from 0 to {limit - 1}")

    @property
    def max_order(self) -> int:
        """N, the longest n-gram; orders run from 2 to N."""
        return len(self.rows_per_head) + 1

    @property
    def lookback(self) -> int:
        """Token ids before a position that its longest n-gram needs: N - 1."""
        return self.max_order - 1

    @property
    def heads_per_layer(self) -> int:
        """Rows that one position reads in one layer: (N - 1) * heads."""
        return len(self.rows_per_head) * self.heads

    @cached_property
    def primes(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """Rows of every head: layer -> one tuple per order -> one prime per head."""
        used: set[int] = set()
        primes = {}
        for layer in self.layers:
            orders = []
            for rows in self.rows_per_head:
                prime, heads = rows - 1, []
                for _ in range(self.heads):
                    prime = nextprime(prime)
                    while prime in used:
                        prime = nextprime(prime)
                    used.add(prime)
                    heads.append(int(prime))
                orders.append(tuple(heads))
            primes[layer] = tuple(orders)
        return primes

    def table_rows(self, layer: int) -> int:
        """Rows of a layer's whole table; may pass 2^31."""
        rows = sum(sum(order) for order in self.primes[layer])
        return -(-rows // self.rows_multiple) * self.rows_multiple

    def offsets(self, layer: int) -> tuple[int, ...]:
        """First row of each head in its layer's table, order-major; int64."""
        flat = [prime for order in self.primes[layer] for prime in order]
        return tuple(sum(flat[:head]) for head in range(len(flat)))

    @cached_property
    def multipliers(self) -> dict[int, tuple[int, ...]]:
        """Layer -> N odd multipliers; [0] is the current token's, [s] that of s tokens back."""
        if self.vocabulary is None:
            raise ConfigError(
                "vocabulary=None: multipliers depend on it; call bind(canonical_map) first"
            )
        bound = max(1, (INT64_MAX // self.vocabulary.canonical_ids) // 2)
        draw = _pcg64 if self.multiplier_rule == "pcg64" else _splitmix64
        return {
            layer: tuple(
                2 * value + 1
                for value in draw(
                    # The ordinal keeps its rows when layers are renumbered; the number does not.
                    self.seed + 10007 * (layer if self.multiplier_rule == "pcg64" else ordinal),
                    bound,
                    self.max_order,
                )
            )
            for ordinal, layer in enumerate(self.layers)
        }

    def canonical_map(self, tokenizer: Any, token_ids: int = 0) -> CanonicalMap:
        """The map that these rules make of a tokenizer (see CanonicalMap.from_tokenizer).

        Under the rule `raw` every id is its own canonical id, up to the vocabulary's size where it
        is known: a model may have more ids than its tokenizer. MismatchError if it has fewer, and
        no model is known that has so many (`token_ids`).
        """
        if self.canonical_rule == "folded":
            return CanonicalMap.from_tokenizer(tokenizer)
        ids = vocabulary_size(backend_of(tokenizer))
        known = ids if self.vocabulary is None else self.vocabulary.token_ids
        if ids > max(known, token_ids):
            raise MismatchError(
                f"the tokenizer has {ids} ids, the specification's vocabulary {known}"
            )
        return CanonicalMap.identity(max(known, ids))

    def model_map(self, canonical: CanonicalMap, token_ids: int) -> CanonicalMap:
        """The map of a model that has so many token ids, by that of its tokenizer.

        A tokenizer that has grown, within these ids, behind the vocabulary that this specification
        has is no other one. MismatchError for any other.
        """
        own = canonical.own
        if self.vocabulary is not None and own.token_ids <= token_ids:
            own = own.first(self.vocabulary.token_ids)
        self.bind(own)
        return own.grown(token_ids)

    def bind(self, canonical: CanonicalMap) -> "Specification":
        """This specification for that vocabulary. MismatchError if it already has another one."""
        if self.canonical_rule == "raw" and canonical.canonical_ids < canonical.token_ids:
            raise MismatchError(
                f"canonical_rule='raw': a map that folds {canonical.token_ids} ids into "
                f"{canonical.canonical_ids} is not the identity"
            )
        own = canonical.own
        vocabulary = Vocabulary(
            token_ids=own.token_ids, canonical_ids=own.canonical_ids, sha256=own.sha256
        )
        if self.vocabulary is not None and self.vocabulary != vocabulary:
            raise MismatchError(
                "the tokenizer's canonical map is not the specification's: tokenizer "
                f"sha256 {vocabulary.sha256} ({vocabulary.canonical_ids} of "
                f"{vocabulary.token_ids} ids), specification "
                f"sha256 {self.vocabulary.sha256} ({self.vocabulary.canonical_ids} of "
                f"{self.vocabulary.token_ids} ids)"
            )
        return replace(self, vocabulary=vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """The file format: rules, vocabulary and constants as plain values.

        Numbers that may exceed 2^53 are decimal strings: a JSON reader that keeps doubles would
        round them, and a rounded multiplier gives another row that looks as good.
        """
        record: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        record["layers"] = list(self.layers)
        record["seed"] = str(self.seed)
        record["rows_per_head"] = [str(rows) for rows in self.rows_per_head]
        record["primes"] = {
            str(layer): [[str(prime) for prime in order] for order in orders]
            for layer, orders in self.primes.items()
        }
        if self.vocabulary is not None:
            record["multipliers"] = {
                str(layer): [str(value) for value in values]
                for layer, values in self.multipliers.items()
            }
        return record

    @property
    def digest(self) -> str:
        """sha256 of the file format with sorted keys and no spaces: what a checkpoint records."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Specification":
        """The specification a file holds. ConfigError where rules and constants disagree, or on
        unknown keys."""
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ConfigError(f"not an {FORMAT} file: its key 'format' must be '{FORMAT}'")
        if record.get("version") != VERSION:
            raise ConfigError(
                f"version={record.get('version')!r}: this package reads version {VERSION}"
            )
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(record) - names - {"format", "version", "primes", "multipliers"})
        if unknown:
            raise ConfigError(
                f"unknown key {unknown[0]!r}: accepted are {', '.join(sorted(names))}"
            )
        values = {name: record[name] for name in names if name in record}
        missing = sorted({"layers", "rows_per_head", "heads", "pad_id"} - set(values))
        if missing:
            raise ConfigError(f"missing key {missing[0]!r}")
        for name in ("layers", "rows_per_head"):
            if not isinstance(values[name], list):
                raise ConfigError(f"{name}={values[name]!r}: a list is needed")
            values[name] = tuple(_integer(name, value) for value in values[name])
        for name in ("heads", "pad_id", "seed", "rows_multiple"):
            if name in values:
                values[name] = _integer(name, values[name])
        if values.get("vocabulary") is not None:
            values["vocabulary"] = _vocabulary(values["vocabulary"])
        specification = cls(**values)
        for name in ("primes", "multipliers"):
            if name in record and record[name] != specification.to_dict().get(name):
                raise ConfigError(
                    f"{name} in the file differ from what its rules give: one of them was edited"
                )
        return specification

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file format as indented JSON."""
        whole.write(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Specification":
        """Reads what `save` wrote. ConfigError names the file."""
        instance("path", path, str, os.PathLike)
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}") from error


def _pcg64(seed: int, bound: int, count: int) -> list[int]:
    draws = np.random.default_rng(seed).integers(low=0, high=bound, size=count, dtype=np.int64)
    return [int(draw) for draw in draws]


def _splitmix64(seed: int, bound: int, count: int) -> list[int]:
    """Entry k is what SplitMix64 gives at the state seed + (k + 1) * gamma, modulo bound."""
    gamma, draws = 0x9E3779B97F4A7C15, []
    for index in range(count):
        # Qwen4-Exp steps the state and then calls a generator that steps it once more.
        value = (seed + (index + 2) * gamma) & UINT64_MAX
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & UINT64_MAX
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & UINT64_MAX
        draws.append((value ^ (value >> 31)) % bound)
    return draws


def _vocabulary(record: Any) -> Vocabulary:
    names = {field.name for field in fields(Vocabulary)}
    if not isinstance(record, dict) or set(record) != names:
        raise ConfigError(
            f"vocabulary={record!r}: an object with {', '.join(sorted(names))} is needed"
        )
    return Vocabulary(
        token_ids=_integer("vocabulary.token_ids", record["token_ids"]),
        canonical_ids=_integer("vocabulary.canonical_ids", record["canonical_ids"]),
        sha256=str(record["sha256"]),
    )


def _integer(name: str, value: Any) -> int:
    """Exact, from a JSON integer or a decimal string; a float has already lost digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit():
        return int(value)
    raise ConfigError(f"{name}={value!r}: an integer or a decimal string is needed")
