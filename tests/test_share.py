"""A model people can pass on: what a saved directory holds, who can open it, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
import transformers.utils.hub
from families import attached
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, canonical_map, tiny_config, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoModel, PreTrainedTokenizerFast

from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification
from engram_lm.model import (
    EngramLMConfig,
    EngramLMForCausalLM,
    EngramLMModel,
    card,
    checksums,
    contents,
)
from engram_lm.store.weights import INDEX

FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "modeling_engram_lm.py"),
    *("specification.json", "canonical_map.safetensors", "checksums.json", "README.md"),
}


def word_level(swapped: int = 5) -> Tokenizer:
    """A tokenizer in which two ids differ in case only: `swapped` and the one after it."""
    tokens = [chr(0x4E00 + i) for i in range(VOCABULARY)]
    tokens[swapped], tokens[swapped + 1] = "a", "A"
    return Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))


def small_model(seed: int = 0, **changes) -> EngramLMForCausalLM:
    """A model of the tokenizer above; `seed` is the specification's and changes no shape."""
    torch.manual_seed(2)
    model = EngramLMForCausalLM(reseeded(tiny_config(**changes), seed))
    model.set_canonical_map(CanonicalMap.from_tokenizer(word_level()))
    return model.eval()


def reseeded(config: EngramLMConfig, seed: int) -> EngramLMConfig:
    memory = config.memory_config
    specification = replace(memory.specification, seed=seed)
    config.memory = replace(memory, specification=specification).to_dict()
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A saved model with its tokenizer; not to be changed."""
    directory = tmp_path_factory.mktemp("whole")
    small_model().save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level(), unk_token=chr(0x4E00))
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def saved(whole, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "saved"))


def edit(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def exchange(path: Path, change) -> None:
    """Changes the tensors of a weights file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_saved_directory_holds_all_that_the_model_needs(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    specification = Specification.load(tmp_path / "specification.json")
    assert specification == model.model.addresses.specification
    recorded = json.loads((tmp_path / "checksums.json").read_text())["files"]
    assert set(recorded) == FILES - {"checksums.json", "README.md"}
    assert {checked.state for checked in checksums.verify(tmp_path)} == {"whole", "unlisted"}


def test_a_model_without_memory_holds_no_specification(tmp_path):
    small_model().save_pretrained(tmp_path)
    tiny_model(memory=None).save_pretrained(tmp_path)  # over the other one
    assert {path.name for path in tmp_path.iterdir()} == FILES - {
        *("specification.json", "canonical_map.safetensors")
    }
    assert EngramLMForCausalLM.from_pretrained(tmp_path).config.memory is None


@pytest.mark.parametrize("first", ["50GB", "20KB"])
def test_shards_and_one_file_may_follow_each_other_in_a_directory(first, tmp_path):
    second = "20KB" if first == "50GB" else "50GB"
    small_model().save_pretrained(tmp_path, max_shard_size=first)
    later = tiny_model()
    later.save_pretrained(tmp_path, max_shard_size=second)
    recorded = json.loads((tmp_path / "checksums.json").read_text())["files"]
    assert {path.name for path in tmp_path.glob("model*")} == {
        name for name in recorded if name.startswith("model") and not name.endswith(".py")
    } | {"modeling_engram_lm.py"}
    assert (len(list(tmp_path.glob("model-*.safetensors"))) > 1) == (second == "20KB")
    loaded = EngramLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.tables["2"].weight, later.model.tables["2"].weight)


def test_state_dict_and_variant_are_saved_as_transformers_does(tmp_path):
    model = small_model()
    halves = {name: value.clone() for name, value in model.state_dict().items()}
    halves["model.tables.0.weight"].fill_(0.5)
    model.save_pretrained(tmp_path, state_dict=halves, variant="half")
    loaded = EngramLMForCausalLM.from_pretrained(tmp_path, variant="half")
    assert loaded.model.tables["0"].weight.eq(0.5).all()
    assert "model.half.safetensors" in (tmp_path / "checksums.json").read_text()


def test_only_the_main_process_writes(tmp_path):
    small_model().save_pretrained(tmp_path, is_main_process=False)
    assert not any(tmp_path.iterdir())


def test_bf16_and_base_models_come_back_whole(tmp_path):
    model = small_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = EngramLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert loaded.model.seal.digest == model.model.addresses.specification.digest
    model.model.save_pretrained(tmp_path / "base")
    base = EngramLMModel.from_pretrained(tmp_path / "base")
    assert base.seal.digest == loaded.model.seal.digest
    headed, info = EngramLMForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert headed.model.seal.digest == base.seal.digest and not info["missing_keys"]


def test_a_model_that_could_not_be_loaded_again_is_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="set_canonical_map"):
        EngramLMForCausalLM(tiny_config()).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_card_says_what_the_model_is_and_leaves_your_own_alone(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.library_name == "engram-lm"
    assert "conditional-memory" in ModelCard(text).data.tags
    specification = model.model.addresses.specification
    assert specification.digest in text and specification.vocabulary.sha256 in text
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    (tmp_path / "README.md").write_text(text + "edited, mark and all")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").write_text("# Mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"


@pytest.mark.parametrize("make", [lambda: small_model(), lambda: attached("llama")])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_an_upload_holds_all_files_and_our_card(way, make, tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, operations, **kwargs):
            for operation in operations:
                uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_text(
                    errors="replace"
                )

    def absent(*arguments, **kwargs):
        raise transformers.utils.hub.EntryNotFoundError("no card there")

    monkeypatch.setattr(ModelCard, "load", absent)
    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", Api)
    if way == "push_to_hub":
        make().push_to_hub("somebody/tiny")
    else:
        make().save_pretrained(tmp_path, push_to_hub=True, repo_id="somebody/tiny")
        assert {checked.state for checked in checksums.verify(tmp_path)} == {"whole", "unlisted"}
    assert set(uploaded) == FILES and card.MARK in uploaded["README.md"]


def alone(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that has seen nothing of ours, offline, with empty caches."""
    root = Path(checksums.__file__).parents[2]
    variables = {
        **os.environ,
        "PYTHONPATH": str(root),
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**variables, **environment},
        cwd=tmp_path,
    )


def test_importing_the_package_is_enough_before_and_after_transformers(whole, tmp_path):
    before = f"""
import sys, engram_lm
assert not {{"transformers", "torch"}} & set(sys.modules)
from transformers import AutoConfig, AutoModelForCausalLM
assert "engram_lm.model" not in sys.modules
assert AutoModelForCausalLM.from_pretrained({str(whole)!r}).model.addresses is not None
assert AutoConfig.for_model("engram_lm", streams=2).streams == 2
"""
    after = f"""
import sys
from transformers import AutoConfig, AutoModel
import engram_lm
assert "engram_lm.model" not in sys.modules
assert AutoConfig.for_model("engram_lm", streams=2).streams == 2
assert AutoModel.from_pretrained({str(whole)!r}).addresses is not None
"""
    for code in (before, after):
        done = alone(code, tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_process_that_never_heard_of_us_opens_it_with_trust_remote_code(whole, tmp_path):
    code = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
path = {str(whole)!r}
tokenizer = AutoTokenizer.from_pretrained(path)
assert tokenizer.vocab_size == {VOCABULARY} and "engram_lm" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "engram_lm"
assert AutoModel.from_pretrained(path, trust_remote_code=True).addresses is not None
model.save_pretrained("again")
"""
    done = alone(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "again").iterdir()} == FILES
    names = ("config.json", "model.safetensors")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_without_the_package_the_error_says_what_to_install(whole, tmp_path):
    code = f"""
import sys
sys.modules["engram_lm"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(whole)!r}, trust_remote_code=True)
"""
    done = alone(code, tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: the code of this model is a package: pip install engram-lm"


def another_tokenizer(directory: Path) -> list[str]:
    word_level(7).save(str(directory / "tokenizer.json"))
    return [CanonicalMap.from_tokenizer(word_level(swapped)).sha256 for swapped in (5, 7)]


def no_map(directory: Path) -> list[str]:
    (directory / "canonical_map.safetensors").unlink()
    return ["no canonical_map.safetensors", "save_pretrained writes it"]


def damaged_map(directory: Path) -> list[str]:
    path = directory / "canonical_map.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    return ["canonical_map.safetensors: no canonical map can be read"]


def another_map(directory: Path) -> list[str]:
    canonical_map(seed=5).save(directory)
    return [canonical_map(seed=5).sha256, CanonicalMap.from_tokenizer(word_level()).sha256]


def edited_specification_file(directory: Path) -> list[str]:
    edit(directory / "specification.json", lambda record: record.update(seed="7"))
    return ["specification.json: multipliers in the file differ from what its rules give"]


def another_specification_file(directory: Path) -> list[str]:
    specification = small_model(seed=7).model.addresses.specification
    specification.save(directory / "specification.json")
    return [specification.digest, digest_of(directory)]


def edited_config(directory: Path) -> list[str]:
    edit(directory / "config.json", lambda r: r["memory"]["specification"].update(heads=3))
    return ["primes in the file differ from what its rules give"]


def another_hash(directory: Path) -> list[str]:
    recorded = digest_of(directory)
    edit(directory / "config.json", lambda r: r["memory"].update(specification_sha256="0" * 64))
    return [recorded, "0" * 64]


def another_seed(directory: Path) -> list[str]:
    """Config, specification and map agree; the weights are of equal shapes and another model."""
    other = small_model(seed=7)
    recorded = digest_of(directory)
    other.config.save_pretrained(directory)
    other.model.addresses.specification.save(directory / "specification.json")
    return [recorded, digest_of(directory)]


def other_weights(directory: Path) -> list[str]:
    other = small_model(seed=7)
    other.save_pretrained(directory / "other")
    shutil.move(directory / "other" / "model.safetensors", directory / "model.safetensors")
    shutil.rmtree(directory / "other")
    return [other.model.seal.digest, digest_of(directory)]


def other_rows(directory: Path) -> list[str]:
    memory = tiny_config().memory_config
    specification = replace(memory.specification, rows_per_head=(60, 60))
    other = EngramLMForCausalLM(
        tiny_config(memory=replace(memory, specification=specification).to_dict())
    )
    other.set_canonical_map(CanonicalMap.from_tokenizer(word_level()))
    other.config.save_pretrained(directory)
    other.model.addresses.specification.save(directory / "specification.json")
    wanted = specification.table_rows(0)
    return ["tables.0.weight", f"({memory.specification.table_rows(0)}, 8)", f"({wanted}, 8)"]


def no_table(directory: Path) -> list[str]:
    exchange(directory / "model.safetensors", lambda tensors: tensors.pop("model.tables.2.weight"))
    return ["the weights lack ", "tables.2.weight"]


def no_seal(directory: Path) -> list[str]:
    exchange(directory / "model.safetensors", lambda tensors: tensors.pop("model.seal.sha256"))
    return ["the weights lack ", "seal.sha256"]


def no_memory(directory: Path) -> list[str]:
    edit(directory / "config.json", lambda record: record.update(memory=None))
    return ["no place for these weights: model.layers.0.engram.conv.norm_weight and "]


def cut_weights(directory: Path) -> list[str]:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["the weights cannot be read"]


def digest_of(directory: Path) -> str:
    memory = json.loads((directory / "config.json").read_text())["memory"]
    return memory["specification_sha256"]


DAMAGES = {
    another_tokenizer: MismatchError,
    no_map: DataError,
    damaged_map: DataError,
    another_map: MismatchError,
    edited_specification_file: ConfigError,
    another_specification_file: MismatchError,
    edited_config: ConfigError,
    another_hash: MismatchError,
    another_seed: MismatchError,
    other_weights: MismatchError,
    other_rows: MismatchError,
    no_table: MismatchError,
    no_seal: MismatchError,
    no_memory: MismatchError,
    cut_weights: DataError,
}


@pytest.mark.parametrize("opener", [EngramLMForCausalLM, AutoModel], ids=lambda c: c.__name__)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_files_out_of_step_are_refused_in_one_line(damage, opener, saved):
    words = damage(saved)
    with pytest.raises(DAMAGES[damage]) as refused:
        opener.from_pretrained(saved)
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_tokenizer_of_the_same_size_given_as_an_argument_is_refused(whole):
    EngramLMForCausalLM.from_pretrained(whole, tokenizer=word_level())
    with pytest.raises(MismatchError, match="tokenizer sha256"):
        EngramLMForCausalLM.from_pretrained(whole, tokenizer=word_level(7))


def test_sizes_that_may_differ_do_so_everywhere_but_in_the_memory(saved):
    def narrow(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()

    exchange(saved / "model.safetensors", narrow)
    with pytest.raises(MismatchError, match=r"model.norm.weight has shape \(5,\)"):
        EngramLMForCausalLM.from_pretrained(saved)
    EngramLMForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True)
    other_rows(saved)
    with pytest.raises(MismatchError, match="tables"):
        EngramLMForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True)


def test_a_state_dict_of_another_specification_is_refused():
    model, other = small_model(), small_model(seed=7)
    model.load_state_dict(small_model().state_dict())
    with pytest.raises(MismatchError) as refused:
        model.load_state_dict(other.state_dict())
    assert model.model.seal.digest in str(refused.value)
    assert other.model.seal.digest in str(refused.value)


def test_weights_loaded_before_the_map_are_compared_when_it_comes():
    model = EngramLMForCausalLM(tiny_config())
    model.load_state_dict(small_model(seed=7).state_dict())
    with pytest.raises(MismatchError, match="trained with"):
        model.set_canonical_map(CanonicalMap.from_tokenizer(word_level()))
    assert model.model.addresses is None


def info(capsys, directory: Path, status: int) -> dict:
    assert main(["info", str(directory), "--json"]) == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_info_says_what_a_whole_directory_holds(capsys, whole):
    found = info(capsys, whole, 0)
    model = EngramLMForCausalLM.from_pretrained(whole)
    specification = model.model.addresses.specification
    assert found["whole"] and not found["problems"] and found["tokenizer"] == "beside it"
    assert found["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["model"]["dtypes"] == {"F32": found["model"]["parameters"]}
    assert found["memory"]["specification_sha256"] == specification.digest
    assert found["memory"]["rows"] == {"0": 240, "2": 306}
    sizes = {file["name"]: file["bytes"] for file in found["files"]}
    assert sizes == {
        path.name: path.stat().st_size for path in whole.iterdir() if path.name != "checksums.json"
    }
    assert main(["info", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert specification.digest[:32] in printed and printed.splitlines()[-1] == "whole"


def test_info_reads_headers_and_not_weights(whole, monkeypatch):
    read = []

    class Watched:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file = None

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(contents, "safe_open", Watched)
    assert contents.read(whole).whole
    assert read == ["model.seal.sha256"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_info_finds_every_file_that_is_out_of_step(damage, capsys, saved):
    words = damage(saved)
    checksums.write(saved)  # so that checksums alone would find nothing
    found = info(capsys, saved, 1)
    assert not found["whole"]
    if damage not in (no_map, cut_weights):  # here `info` has other words for the same
        assert any(all(word in line for word in words) for line in found["problems"])
    assert main(["info", str(saved)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"not whole, problems: {len(found['problems'])}"
    assert printed[-2] == found["problems"][-1]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", sorted(FILES - {"checksums.json", "README.md"}))
def test_info_finds_a_flipped_bit_and_a_missing_file(name, saved):
    sha = {file.name: file for file in checksums.verify(saved)}[name]
    flipped(saved / name)
    problems = contents.read(saved).problems
    assert any(line.startswith(f"damaged: {name} has sha256 ") for line in problems)
    assert sha.state == "whole"
    (saved / name).unlink()
    if name != "config.json":
        assert f"missing: {name}" in contents.read(saved).problems


def test_info_finds_missing_and_extra_shards(tmp_path):
    small_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert contents.read(tmp_path).whole
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    shutil.copy(first, tmp_path / "model-copy.safetensors")
    second.unlink()
    found = contents.read(tmp_path)
    states = {file.name: file.state for file in found.files}
    assert states[second.name] == "missing" and states["model-copy.safetensors"] == "extra"
    assert {f"missing: {second.name}"} < set(found.problems)


@pytest.mark.parametrize("stale", ["model.safetensors", "z.safetensors"])
def test_stale_weights_beside_an_index_are_found_and_not_opened(tmp_path, stale):
    """transformers reads the one file first, and of a name that two shards hold the last."""
    model = small_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    name = "model.tables.0.weight"
    names = dict.fromkeys(weights, "z.safetensors") | {name: "a.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    others = {each: weight for each, weight in weights.items() if each != name}
    save_file({name: weights[name]}, tmp_path / "a.safetensors", {"format": "pt"})
    save_file(others, tmp_path / "z.safetensors", {"format": "pt"})
    found = EngramLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(found.state_dict()[name], weights[name])
    save_file({**others, name: weights[name] + 1}, tmp_path / stale, {"format": "pt"})
    for options in ({}, {"memory": "disk", "memory_budget": "1MB"}):
        with pytest.raises(DataError, match="transformers would read the last|of two saves"):
            EngramLMForCausalLM.from_pretrained(tmp_path, **options)
    problems = [line for line in contents.read(tmp_path).problems if line.startswith("twice: ")]
    assert problems or stale == "model.safetensors"


def test_info_of_a_directory_without_checksums_or_specification_says_so(saved):
    (saved / "checksums.json").unlink()
    (saved / "specification.json").unlink()
    assert contents.read(saved).problems == (
        "missing: checksums.json, so no file can be verified",
        "missing: specification.json",
    )
    EngramLMForCausalLM.from_pretrained(saved)  # config.json is what counts


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model_type": "engram_lm", "streams": "x"}', "\0"], ids=repr
)
@pytest.mark.parametrize(
    "name", ["config.json", "checksums.json", "specification.json", "tokenizer.json"]
)
def test_files_of_any_content_are_one_line(name, text, capsys, saved):
    (saved / name).write_text(text)
    assert not contents.read(saved).whole
    if name == "checksums.json":
        return  # only `info` reads it
    assert main(["generate", f"--model={saved}", "--prompt=a"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("engram generate: error: ") and captured.err.count("\n") == 1


def test_info_points_to_the_model_of_a_training_run(capsys, whole, tmp_path):
    def refused(directory: Path) -> str:
        assert main(["info", str(directory)]) == 2
        return capsys.readouterr().err

    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "no saved model" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "a model of type 'llama', not 'engram_lm'" in refused(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert "not saved its model yet" in refused(tmp_path)
    shutil.copytree(whole, tmp_path / "model")
    assert f"the model it saved is {tmp_path / 'model'}" in refused(tmp_path)


def test_a_tokenizer_without_a_first_token_generates_from_the_prompt_alone(capsys, whole):
    base = ["generate", f"--model={whole}", "--json", "--tokens=3"]
    assert main([*base, "--prompt=a"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 3
    assert main([*base, "--prompt="]) == 2
    assert "prompt='': no tokens" in capsys.readouterr().err


def test_a_model_in_a_subfolder_is_checked_there(whole):
    model = EngramLMForCausalLM.from_pretrained(whole.parent, subfolder=whole.name)
    assert model.model.addresses is not None


def test_large_files_are_hashed_with_a_bar_on_a_terminal(whole, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    checksums.verify(whole)
    assert not capsys.readouterr().err
    monkeypatch.setattr(checksums, "_LARGE", 0)
    checksums.verify(whole)
    bar = capsys.readouterr().err
    assert "verifying" in bar and "/s" in bar
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    checksums.verify(whole)
    assert not capsys.readouterr().err
