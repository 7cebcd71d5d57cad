"""A second implementation of the addressing, written from docs/addressing.md alone.

Nothing but that page was read, and nothing but the standard library is used. The sections below
carry the page's numbers. Everything is a Python integer, so nothing can overflow or be rounded.
"""

import hashlib
import json
import re
import struct
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import Any

M32, M64, M128 = 2**32 - 1, 2**64 - 1, 2**128 - 1  # lo32, lo64, lo128 are "& M.."

# 1. Rules
RULES = {
    "canonical_rule": ("folded", "raw"),
    "multiplier_rule": ("pcg64", "splitmix64"),
    "prime_rule": ("distinct",),
    "boundary_rule": ("cross", "document", "eos"),
}
NUMBERS = {"layers", "rows_per_head", "heads", "seed", "pad_id", "rows_multiple"}
REQUIRED = {"format", "version"} | NUMBERS | set(RULES)
OPTIONAL = {"vocabulary", "primes", "multipliers"}

# 2. Canonical ids. (str.strip() without an argument would also take U+001C to U+001F.)
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    chr(c) for c in range(0x2000, 0x200B)
)


def _folded_key(text: str, raw_form: str) -> str:
    if "\ufffd" in text:
        return raw_form
    key = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    # One character at a time: str.lower() of a whole word would make a final sigma.
    key = "".join(c.lower() for c in key if unicodedata.category(c)[0] != "M")
    key = re.sub("[ \t\r\n]+", " ", key)
    return (key if key == " " else key.strip(WHITE_SPACE)) or text


def fold(texts: list[str], raw_forms: list[str]) -> list[int]:
    """The canonical map of rule `folded`, from each id's decoded text and raw form."""
    ids: dict[str, int] = {}
    pairs = zip(texts, raw_forms, strict=True)
    return [ids.setdefault(_folded_key(text, raw), len(ids)) for text, raw in pairs]


def map_checksum(canonical: list[int]) -> str:
    """The sha256 of the entries as little-endian 32-bit integers."""
    return hashlib.sha256(struct.pack(f"<{len(canonical)}I", *canonical)).hexdigest()


# 3. Multipliers
def _splitmix64_draws(base: int, bound: int, count: int) -> list[int]:
    draws = []
    for s in range(count):
        z = (base + (s + 2) * 0x9E3779B97F4A7C15) & M64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
        draws.append((z ^ (z >> 31)) % bound)
    return draws


def _state_words(entropy: int) -> list[int]:
    """Steps 1 to 3 of pcg64: four 64-bit words from one number."""
    words = [entropy >> shift & M32 for shift in range(0, max(1, entropy.bit_length()), 32)]
    words += [0] * (4 - len(words))
    h = 0x43B0D7E5

    def hashmix(v: int) -> int:
        nonlocal h
        v ^= h
        h = (h * 0x931E8875) & M32
        v = (v * h) & M32
        return v ^ (v >> 16)

    def mix(x: int, y: int) -> int:
        r = (x * 0xCA01F9DD - y * 0x4973F715) & M32
        return r ^ (r >> 16)

    pool = [hashmix(word) for word in words[:4]]
    for i in range(4):
        for k in range(4):
            if k != i:
                pool[k] = mix(pool[k], hashmix(pool[i]))
    for word in words[4:]:
        pool = [mix(x, hashmix(word)) for x in pool]

    g = 0x8B51F9DD
    out = []
    for i in range(8):
        v = pool[i % 4] ^ g
        g = (g * 0x58F38DED) & M32
        v = (v * g) & M32
        out.append(v ^ (v >> 16))
    return [out[2 * i] + 2**32 * out[2 * i + 1] for i in range(4)]


def _pcg64_outputs(entropy: int) -> Iterator[int]:
    """Step 4."""
    w = _state_words(entropy)
    inc = (2 * (w[2] * 2**64 + w[3]) + 1) & M128

    def step(state: int) -> int:
        return (state * 0x2360ED051FC65DA44385DF649FCCF645 + inc) & M128

    state = step((step(0) + w[0] * 2**64 + w[1]) & M128)
    while True:
        state = step(state)
        word, places = (state >> 64) ^ (state & M64), state >> 122
        yield ((word >> places) | (word << (64 - places))) & M64


def _pcg64_draws(entropy: int, bound: int, count: int) -> list[int]:
    """Step 5."""
    if bound <= 2**32:
        raise ValueError("too many canonical ids: NumPy would draw 32 bits at a time")
    outputs, t = _pcg64_outputs(entropy), (2**64 - bound) % bound
    draws = []
    for _ in range(count):
        p = next(outputs) * bound
        while p & M64 < t:
            p = next(outputs) * bound
        draws.append(p >> 64)
    return draws


# 4. Primes
def _is_prime(n: int) -> bool:
    if n < 4 or n % 2 == 0:
        return n in (2, 3)
    divisor = 3
    while divisor * divisor <= n and n % divisor:
        divisor += 2
    return divisor * divisor > n


def _next_prime(n: int, taken: set[int]) -> int:
    while n in taken or not _is_prime(n):
        n += 1
    taken.add(n)
    return n


# 6. The file: what a reader refuses
def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_decimal(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("0|[1-9][0-9]*", value) is not None


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _require_equal(stated: object, expected: object, name: str) -> None:
    # As JSON text, because Python holds 2, 2.0 and (for 1) True for equal.
    _require(_compact(stated) == _compact(expected), f"{name}: {stated!r} is not {expected!r}")


def _check_record(record: dict[str, Any]) -> None:
    _require(REQUIRED <= set(record) <= REQUIRED | OPTIONAL, "keys are missing or unknown")
    _require_equal(record["format"], "engram-specification", "format")
    _require_equal(record["version"], 2, "version")
    for name, known in RULES.items():
        _require(record[name] in known, f"{name}: {record[name]!r} is none of {known}")
    for name, low in (("heads", 1), ("rows_multiple", 1), ("pad_id", 0)):
        _require(type(record[name]) is int and record[name] >= low, f"{name}: {record[name]!r}")
    _require(_is_decimal(record["seed"]) and int(record["seed"]) < 2**63, "seed")
    layers, asked = record["layers"], record["rows_per_head"]
    _require(isinstance(layers, list) and len(layers) > 0, "layers: not a list with entries")
    _require(all(type(x) is int and x >= 0 for x in layers), f"layers: {layers!r}")
    _require(layers == sorted(set(layers)), "layers: not ascending")
    _require(isinstance(asked, list) and len(asked) > 0, "rows_per_head: not a list with entries")
    _require(all(_is_decimal(x) and int(x) > 0 for x in asked), f"rows_per_head: {asked!r}")


def digest(record: dict[str, Any]) -> str:
    """The digest of a complete record."""
    return hashlib.sha256(_compact(record).encode("ascii")).hexdigest()


class Addressing:
    """The row numbers of one specification with one canonical map, in a model of so many ids."""

    def __init__(
        self, record: dict[str, Any], canonical: list[int], vocab_size: int | None = None
    ) -> None:
        _check_record(record)
        self.canonical, self.pad_id = list(canonical), record["pad_id"]
        self.boundary_rule: str = record["boundary_rule"]
        self.order = len(record["rows_per_head"]) + 1
        _require(self.pad_id < len(canonical), "pad_id: not below the number of token ids")
        size = 0  # V', and a check that new canonical ids come in the order 0, 1, 2, ...
        for entry in canonical:
            _require(0 <= entry <= size, "the canonical map does not number its ids in order")
            size = max(size, entry + 1)
        if record["canonical_rule"] == "raw":
            _require(size == len(canonical), "the canonical map of rule raw is not the identity")

        # 4. Primes, offsets, tables
        self.primes: dict[int, list[list[int]]] = {}
        self.offsets: dict[int, list[int]] = {}
        self.table_rows: dict[int, int] = {}
        taken: set[int] = set()
        for layer in record["layers"]:
            self.primes[layer] = [
                [_next_prime(int(asked), taken) for _ in range(record["heads"])]
                for asked in record["rows_per_head"]
            ]
            flat = [prime for of_order in self.primes[layer] for prime in of_order]
            self.offsets[layer] = [sum(flat[:i]) for i in range(len(flat))]
            multiple = record["rows_multiple"]
            self.table_rows[layer] = (sum(flat) + multiple - 1) // multiple * multiple

        # 3. Multipliers
        seed, bound = int(record["seed"]), max(1, ((2**63 - 1) // size) // 2)
        self.multipliers: dict[int, list[int]] = {}
        for j, layer in enumerate(record["layers"]):
            if record["multiplier_rule"] == "pcg64":
                draws = _pcg64_draws(seed + 10007 * layer, bound, self.order)
            else:
                draws = _splitmix64_draws(seed + 10007 * j, bound, self.order)
            self.multipliers[layer] = [2 * draw + 1 for draw in draws]

        # 6. What the file states besides must be what was computed
        checksum = map_checksum(self.canonical)
        computed: dict[str, object] = {
            "vocabulary": {"token_ids": len(canonical), "canonical_ids": size, "sha256": checksum},
            "primes": {str(i): [[str(p) for p in o] for o in x] for i, x in self.primes.items()},
            "multipliers": {str(i): [str(m) for m in x] for i, x in self.multipliers.items()},
        }
        for name, expected in computed.items():
            if name in record and (name, record[name]) != ("vocabulary", None):
                _require_equal(record[name], expected, name)

        # 2. Ids beyond the tokenizer's
        beyond = len(canonical) if vocab_size is None else vocab_size
        self.canonical += [size + i - len(canonical) for i in range(len(canonical), beyond)]

    # 5. Rows of a position
    def rows(
        self,
        token_ids: Sequence[int],
        history: Sequence[int | None] = (),
        padding: Collection[int] = frozenset(),
        masked: Collection[int] = frozenset(),
        document_starts: Collection[int] = frozenset(),
    ) -> dict[int, list[list[int] | None]]:
        """The rows that each position reads in each layer's table; None at padded positions."""
        line: list[int | None] = list(history)  # without padding; None: no token, or a masked one
        starts: set[int] = set()  # places in `line`
        place: dict[int, int] = {}  # position -> place in `line`
        for t, token in enumerate(token_ids):
            if t not in padding:
                self._check_token(token)
                place[t] = len(line)
                if t in document_starts:
                    starts.add(len(line))
                line.append(None if t in masked else token)
        for token in history:
            if token is not None:
                self._check_token(token)

        result: dict[int, list[list[int] | None]] = {layer: [] for layer in self.primes}
        for t in range(len(token_ids)):
            values = self._values(line, starts, place[t]) if t in place else None
            for layer, read in result.items():
                read.append(None if values is None else self._row_numbers(layer, values))
        return result

    def _check_token(self, token: int) -> None:
        _require(0 <= token < len(self.canonical), f"token id {token} is out of range")

    def _values(self, line: list[int | None], starts: set[int], t: int) -> list[int]:
        values: list[int] = []
        blocked = False
        for s in range(self.order):
            token = line[t - s] if t >= s else None
            if s >= 1 and self.boundary_rule == "document":
                blocked |= t - s + 1 in starts
            if s >= 1 and self.boundary_rule == "eos":
                blocked |= token == self.pad_id
            blocked |= token is None
            values.append(self.canonical[self.pad_id if blocked or token is None else token])
        return values

    def _row_numbers(self, layer: int, values: list[int]) -> list[int]:
        multipliers, offsets = self.multipliers[layer], iter(self.offsets[layer])
        mix = values[0] * multipliers[0] % 2**63
        read: list[int] = []
        for n, primes in enumerate(self.primes[layer], start=2):
            mix ^= values[n - 1] * multipliers[n - 1] % 2**63
            read += [mix % prime + next(offsets) for prime in primes]
        return read
