"""Makes the conformance kit: two small checkpoints of released layouts, and what they must give.

    python conformance/make.py

Nothing here imports engram_lm. DeepSeek-V4.1's side is written out in Python integers and float64
from its published definition; Qwen4-Exp's is computed by transformers' own classes.
"""

import json
import math
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

HERE = Path(__file__).parent
TEXTS = [
    "Only Alexander the Great could tame the horse Bucephalus.",
    "only  ALEXANDER\tthe great\n\nÉtude étude ETUDE Ａｂｃ 中文 ½ 🙂",
    "a",
    "the cat sat on the mat. The Cat sat on the mat. THE CAT",
    "কা ক কি খা খ",  # vowel signs are marks of category Mc: folding drops these, too
]
SPECIALS = ["<bos>", "<eos>", "<pad>"]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    deepseek(tokenizer, HERE / "deepseek_v41")
    beyond(tokenizer, HERE / "beyond_the_tokenizer.json")
    qwen(tokenizer, HERE / "qwen4_exp")


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of 400 ids in which many differ in case, accents or white space only."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\S+|\s+"), "isolated")  # a letter and its marks together
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


# --- DeepSeek-V4.1 -------------------------------------------------------------------------------

DEEPSEEK = {
    "engram_layer_ids": [1, 14],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 200,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_pad_token_id": 2,
    "hidden_size": 64,
    "hc_mult": 4,
    "num_hidden_layers": 16,
    "rms_norm_eps": 1e-20,
}
INT64_MAX = 2**63 - 1


def deepseek(tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    canonical = fold(tokenizer)
    layers = DEEPSEEK["engram_layer_ids"]
    primes = draw_primes()
    text = {
        **DEEPSEEK,
        "vocab_size": len(canonical),
        "engram_compressed_vocab_size": max(canonical) + 1,
        "engram_num_embeddings": [sum(primes[layer]) for layer in layers],
    }
    write_json(
        out / "config.json",
        {
            "architectures": ["DeepseekV41ForCausalLM"],
            "model_type": "deepseek_v41",
            "text_config": {"model_type": "deepseek_v41_text", **text},
        },
    )
    weights = {layer: deepseek_weights(sum(primes[layer])) for layer in layers}
    shards, index = {}, {}
    for number, layer in enumerate(layers, start=1):  # one layer a shard, as released
        name = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        shards[name] = {f"layers.{layer}.engram.{k}": v for k, v in weights[layer].items()}
        index |= dict.fromkeys(shards[name], name)
        save_file(shards[name], out / name, metadata={"format": "pt"})
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})

    cases, tensors = [], {}
    for name, ids, history, masked, starts in deepseek_cases(tokenizer):
        rows = {
            layer: deepseek_rows(canonical, layer, primes[layer], ids, history, masked, starts)
            for layer in layers
        }
        cases.append(
            {
                "name": name,
                "token_ids": ids,
                "history": history,
                "masked_positions": masked,
                "document_starts": starts,
                "canonical_ids": [canonical[token] for token in ids],
                "rows": {str(layer): rows[layer] for layer in layers},
            }
        )
        for layer in layers:
            hidden = torch.randn(len(ids), DEEPSEEK["hc_mult"], DEEPSEEK["hidden_size"])
            values = deepseek_fusion(weights[layer], rows[layer], hidden, masked)
            for key, value in {"hidden": hidden, **values}.items():
                tensors[f"{name}.layers.{layer}.{key}"] = value.float().contiguous()
    multipliers = {str(layer): draw_multipliers(layer, max(canonical) + 1) for layer in layers}
    write_json(
        out / "expected.json",
        {
            "multipliers": {k: [str(value) for value in v] for k, v in multipliers.items()},
            "primes": {str(layer): primes[layer] for layer in layers},
            "canonical_map": canonical,
            "cases": cases,
        },
    )
    save_file(tensors, out / "expected.safetensors")


def beyond(tokenizer: Tokenizer, path: Path) -> None:
    """Rows of the same memory in a model that has twice as many token ids as its tokenizer."""
    canonical, primes = fold(tokenizer), draw_primes()
    V, ids = len(canonical), tokenizer.encode(TEXTS[3]).ids
    cases = []
    for name, token_ids, history, masked, starts in (
        ("added", [*ids[:4], V, V + 1, *ids[4:8], V], [], [], []),
        ("padding_of_the_embedding", [2 * V - 1, V + 7, 2 * V - 1, *ids[:3]], [], [], []),
        ("history", ids[:4], [V, ids[0], 2 * V - 2], [], []),
        ("masked", [ids[0], V, V + 1, *ids[1:5]], [], [2], []),
        ("two_documents", [V, V, *ids[:2], V + 3, V, *ids[2:4]], [], [], [0, 4]),
    ):
        rows = {
            str(layer): deepseek_rows(
                canonical, layer, primes[layer], token_ids, history, masked, starts
            )
            for layer in DEEPSEEK["engram_layer_ids"]
        }
        cases.append(
            {
                "name": name,
                "token_ids": token_ids,
                "history": history,
                "masked_positions": masked,
                "document_starts": starts,
                "canonical_ids": [class_of(canonical, token) for token in token_ids],
                "rows": rows,
            }
        )
    write_json(path, {"checkpoint": "deepseek_v41", "vocab_size": 2 * V, "cases": cases})


def class_of(canonical: list[int], token: int) -> int:
    """Canonical id; ids beyond the tokenizer's are classes of their own."""
    more = token - len(canonical)
    return canonical[token] if more < 0 else max(canonical) + 1 + more


def deepseek_cases(tokenizer: Tokenizer):
    """(name, token ids, history, masked positions, document starts)."""
    encoded = [tokenizer.encode(text).ids for text in TEXTS]
    for number, ids in enumerate(encoded):
        yield f"text{number}", ids, [], [], []
    yield "image_tokens", encoded[0], [], [2, 3, 7], []
    yield "two_documents", encoded[2] + encoded[3], [], [], [0, len(encoded[2])]
    for length in (1, 2, 3, 5):
        yield f"history{length}", encoded[0][length:], encoded[0][:length], [], []


def fold(tokenizer: Tokenizer) -> list[int]:
    """Token id -> canonical id."""
    classes: dict[str, int] = {}
    ids = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" in text:
            key = tokenizer.id_to_token(token)
        else:
            key = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
            key = "".join(c.lower() for c in key if unicodedata.category(c)[0] != "M")
            key = re.sub(r"[ \t\r\n]+", " ", key)
            key = (key if key == " " else key.strip()) or text
        ids.append(classes.setdefault(key, len(classes)))
    return ids


def draw_primes() -> dict[int, list[int]]:
    """Layer -> primes, order-major: the next ones from the base on that no head has yet."""
    used: set[int] = set()
    primes: dict[int, list[int]] = {}
    for layer in DEEPSEEK["engram_layer_ids"]:
        primes[layer] = []
        for _ in range(DEEPSEEK["engram_max_ngram_size"] - 1):
            candidate = DEEPSEEK["engram_vocab_size"]
            for _ in range(DEEPSEEK["engram_n_heads"]):
                while candidate in used or any(
                    candidate % divisor == 0 for divisor in range(2, math.isqrt(candidate) + 1)
                ):
                    candidate += 1
                used.add(candidate)
                primes[layer].append(candidate)
    return primes


def draw_multipliers(layer: int, canonical_ids: int) -> list[int]:
    bound = max(1, (INT64_MAX // canonical_ids) // 2)
    draws = np.random.default_rng(10007 * layer).integers(
        low=0, high=bound, size=DEEPSEEK["engram_max_ngram_size"], dtype=np.int64
    )
    return [2 * int(draw) + 1 for draw in draws]


def deepseek_rows(canonical, layer, primes, ids, history, masked, starts) -> list[list[int]]:
    """Rows of every position: 2 heads of bigrams, then of trigrams, then of 4-grams."""
    multipliers = draw_multipliers(layer, max(canonical) + 1)
    pad, before = canonical[DEEPSEEK["engram_pad_token_id"]], len(history)
    stream = [*history, *ids]
    dead = {before + position for position in masked}
    first = {before + position for position in starts}
    rows = []
    for position in range(before, len(stream)):
        blocked = position in dead
        value = pad if blocked else class_of(canonical, stream[position])
        mix = value * multipliers[0] % 2**63
        row = []
        for back in range(1, DEEPSEEK["engram_max_ngram_size"]):
            at = position - back
            blocked = blocked or at < 0 or at in dead or at + 1 in first
            value = pad if blocked else class_of(canonical, stream[at])
            mix ^= value * multipliers[back] % 2**63
            for _ in range(DEEPSEEK["engram_n_heads"]):
                row.append(mix % primes[len(row)] + sum(primes[: len(row)]))
        rows.append(row)
    return rows


def deepseek_weights(rows: int) -> dict[str, torch.Tensor]:
    """Values of a trained size: e4m3 with one power of two per 32 columns or 32 x 32 block."""
    width, streams, dim = (DEEPSEEK[k] for k in ("hidden_size", "hc_mult", "engram_head_dim"))
    memory = (DEEPSEEK["engram_max_ngram_size"] - 1) * DEEPSEEK["engram_n_heads"] * dim

    def fp8(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 100).to(torch.float8_e4m3fn)

    def e8m0(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)

    return {
        "embed.weight": fp8(rows, dim),
        "embed.scale": e8m0(116, 122, rows, dim // 32),
        "wkv.weight": fp8((streams + 1) * width, memory),
        "wkv.scale": e8m0(114, 118, (streams + 1) * width // 32, memory // 32),
        "q_weight": (0.5 + torch.rand(streams, width)).bfloat16(),
        "k_weight": (0.5 + torch.rand(streams, width)).bfloat16(),
    }


def deepseek_fusion(weights, rows, hidden, masked) -> dict[str, torch.Tensor]:
    """Vectors (T, M), gate (T, S) and update (T, S, D), in float64 from the stored bytes."""

    def power(scale: torch.Tensor) -> torch.Tensor:
        return 2.0 ** (scale.view(torch.uint8).double() - 127)

    streams, width = hidden.shape[1:]
    table = weights["embed.weight"].double() * power(weights["embed.scale"]).repeat_interleave(
        32, dim=1
    )
    wkv = weights["wkv.weight"].double() * power(weights["wkv.scale"]).repeat_interleave(
        32, dim=0
    ).repeat_interleave(32, dim=1)
    vectors = table[torch.tensor(rows)].flatten(1)
    kv = vectors @ wkv.T
    key, value = kv[:, : streams * width].unflatten(1, (streams, width)), kv[:, streams * width :]
    h, eps = hidden.double(), DEEPSEEK["rms_norm_eps"]
    weight = weights["q_weight"].double() * weights["k_weight"].double()
    rstd = torch.rsqrt(h.square().mean(-1) + eps) * torch.rsqrt(key.square().mean(-1) + eps)
    dot = (h * weight * key).sum(-1) * rstd * width**-0.5
    gate = torch.sigmoid(torch.copysign(dot.abs().clamp(min=1e-6).sqrt(), dot))
    gate[torch.tensor(masked, dtype=torch.long)] = 0.0
    return {"vectors": vectors, "gate": gate, "update": gate[..., None] * value[:, None]}


# --- Qwen4-Exp -----------------------------------------------------------------------------------


def qwen(tokenizer: Tokenizer, out: Path) -> None:
    eos = tokenizer.token_to_id("<eos>")
    config = Qwen4ExpTextConfig(
        vocab_size=420,  # more than the tokenizer has, as released
        hidden_size=64,
        hc_count=4,
        hc_lowrank=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
        ple_layer_ids=[2, 3],
        ple_embed_dim=64,
        heads_per_ngram=2,
        ngram_vocab_size_base=150,
        split_ngram_parts=4,
        eos_token_id=eos,
        dtype="bfloat16",
    )
    model = Qwen4ExpForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ple." in name:  # far from the initial zeros, which would hide norms and conv
                parameter.normal_(std=0.3)
    model.save_pretrained(out)
    keep_memory_only(out)
    tokenizer.save(str(out / "tokenizer.json"))
    cases, tensors = [], {}
    for name, ids in qwen_cases(tokenizer, eos):
        rows = {}
        for layer_id in config.ple_layer_ids:
            layer = layer_id - 1
            ple = model.model.layers[layer].ple.float()
            hidden = torch.randn(1, len(ids), config.hc_count * config.hidden_size)
            seen: list[torch.Tensor] = []
            hook = ple.ple_embedding.ngram_embedding.register_forward_pre_hook(
                lambda _module, given, seen=seen: seen.append(given[0])
            )
            with torch.no_grad():
                vectors = ple.ple_embedding(torch.tensor([ids]), None)
                update = ple(hidden, torch.tensor([ids]), None)
                shape = (config.hc_count, config.hidden_size)
                key = ple.norm_key(ple.key_proj(vectors)).unflatten(-1, shape)
                dot = (key * ple.norm_query(hidden).unflatten(-1, shape)).sum(-1)
                dot = dot / math.sqrt(config.hidden_size)
                gate = torch.sigmoid(dot.abs().clamp_min(1e-6).sqrt() * dot.sign())
            hook.remove()
            rows[str(layer)] = seen[0][0].tolist()
            for key_name, value in {
                "hidden": hidden[0].unflatten(-1, shape),
                "vectors": vectors[0],
                "gate": gate[0],
                "update": update[0].unflatten(-1, shape),
            }.items():
                tensors[f"{name}.layers.{layer}.{key_name}"] = value.contiguous()
        cases.append({"name": name, "token_ids": ids, "rows": rows})
    embeddings = {
        str(layer - 1): model.model.layers[layer - 1].ple.ple_embedding
        for layer in config.ple_layer_ids
    }
    write_json(
        out / "expected.json",
        {
            "multipliers": {
                layer: [str(value) for value in module.layer_multipliers.tolist()]
                for layer, module in embeddings.items()
            },
            "primes": {layer: module.head_vocab_sizes for layer, module in embeddings.items()},
            "cases": cases,
        },
    )
    save_file(tensors, out / "expected.safetensors")


def qwen_cases(tokenizer: Tokenizer, eos: int):
    encoded = [tokenizer.encode(text).ids for text in TEXTS]
    for number, ids in enumerate(encoded):
        yield f"text{number}", ids
    yield "eos_inside", [*encoded[2], eos, *encoded[0][:6], eos, eos, *encoded[3][:5]]
    yield "eos_first", [eos, *encoded[0][:4]]


def keep_memory_only(directory: Path) -> None:
    """Drops what is not memory from the checkpoint: the kit is about nothing else."""
    path = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".ple." in name}
    save_file(kept, path, metadata={"format": "pt"})
    (directory / "generation_config.json").unlink(missing_ok=True)


def write_json(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
