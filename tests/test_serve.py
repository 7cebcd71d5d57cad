"""`engram serve` asked by the openai client over loopback, as its users ask it."""

import asyncio
import copy
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from families import bare, memory, speak

import engram_lm
from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.serving.batched_requests import InBatches
from engram_lm.serving.openai_server import OneModel

PROMPT = "A city is a"
TOKENS = 12


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A bare Llama with the corpus's tokenizer, two packs for it, and its context of 128."""
    root = tmp_path_factory.mktemp("serve")
    tokenizer = corpus.tokenizer()
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": 0}
    model = bare("llama", **sizes)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("law", "code")):
        model = bare("llama", **sizes)
        torch.manual_seed(seed)
        engram_lm.attach(model, canonical, memory())
        speak(model)
        engram_lm.save_pack(model, root / name)
    return root


@pytest.fixture(scope="module")
def model(directories):
    made = engram_lm.attach(bare_from(directories), None, None)
    for name in ("law", "code"):
        made.load_pack(name, directories / name)
    return made


def bare_from(directories):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directories / "base")


@pytest.fixture(scope="module")
def url(directories):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "engram_lm", "serve", str(directories / "base")]
    for name in ("law", "code"):
        command += ["--pack", f"{name}={directories / name}"]
    process = subprocess.Popen(
        [*command, "--name", "llama", "--port", str(port), "--threads", "1"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    base = f"http://127.0.0.1:{port}"
    for _ in range(300):
        assert process.poll() is None, process.stderr.read()
        try:
            urllib.request.urlopen(f"{base}/health").close()
            break
        except urllib.error.URLError:
            time.sleep(0.2)
    yield f"{base}/v1"
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM and "Traceback" not in errors


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def wanted(model, packs, prompt=PROMPT, tokens=TOKENS, stop=None) -> str:
    tokenizer = corpus.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": tokens, "stop_strings": stop, "tokenizer": tokenizer}
    ids = model.generate(**inputs, packs=[packs], do_sample=False, **options)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(client, name, prompt=PROMPT, **options):
    return client.completions.create(
        model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, **options
    )


NAMES = {"llama": (), "llama/law": ("law",), "llama/code": ("code",)}
NAMES["llama/law+code"] = ("law", "code")


def test_the_names_that_are_listed_say_what_the_model_says_with_their_packs(client, model):
    assert [each.id for each in client.models.list()] == ["llama", "llama/law", "llama/code"]
    texts = {name: ask(client, name).choices[0].text for name in NAMES}
    assert texts == {name: wanted(model, packs) for name, packs in NAMES.items()}
    assert len(set(texts.values())) == 4


def test_a_streamed_text_is_the_same(client, model):
    parts = [part.choices[0].text for part in ask(client, "llama/law", stream=True) if part.choices]
    assert len(parts) > 3 and "".join(parts) == wanted(model, ("law",))


def test_two_requests_at_once_with_different_packs_get_each_its_own(client, model):
    names = ["llama/law", "llama/code", "llama", "llama/law"] * 2
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda name: ask(client, name).choices[0].text, names))
    assert answers == [wanted(model, NAMES[name]) for name in names]


def test_requests_that_wait_are_generated_together(model, monkeypatch):
    batches = []
    generate = model.generate

    def counted(ids_BT, **options):
        batches.append(len(ids_BT))
        return generate(ids_BT, **options)

    monkeypatch.setattr(model, "generate", counted)
    tokenizer = corpus.tokenizer()
    manager, models = InBatches(3), OneModel("llama", model, tokenizer)
    asked = [  # a prompt, its packs, tokens wanted, where it stops
        ("A city is a", "llama/law", 12, None),
        ("The longer of two prompts, with more tokens than", "llama/code", 5, None),
        ("A", "llama", 9, None),
        ("A river in Europe", "llama/law+code", 20, None),
        ("A city is a", "llama/law", 12, ["e"]),
    ]

    async def all_at_once():
        free = threading.Event()
        manager.submit(free.wait)
        tasks = []
        for number, (prompt, name, tokens, stop) in enumerate(asked):
            config = copy.deepcopy(model.generation_config)
            config.update(max_new_tokens=tokens, do_sample=False, stop_strings=stop)
            packed, _ = models.load_model_and_processor(name)
            inputs = tokenizer(prompt, return_tensors="pt")
            task = manager.generate_non_streaming(packed, tokenizer, inputs, config, str(number))
            tasks.append(asyncio.ensure_future(task))
        await asyncio.sleep(0)
        assert len(manager.waiting) == len(asked)
        tasks[2].cancel()
        free.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(all_at_once())
    assert batches == [3, 1, 1]
    monkeypatch.undo()
    assert isinstance(answers.pop(2), asyncio.CancelledError)
    for (prompt, name, tokens, stop), (text, prompt_tokens, ids) in zip(
        asked[:2] + asked[3:], answers, strict=True
    ):
        alone = wanted(model, NAMES[name], prompt, tokens, stop)
        assert text == alone and len(ids) <= tokens, (prompt, name)
        assert prompt_tokens == len(tokenizer(prompt)["input_ids"])
    assert len(answers[3][2]) < 12  # it stopped at its word


def test_a_cancelled_request_gives_way_to_the_next(client, model):
    stream = client.completions.create(
        model="llama/law", prompt=PROMPT, max_tokens=100, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    assert ask(client, "llama/code").choices[0].text == wanted(model, ("code",))


def test_a_prompt_that_is_too_long_and_a_name_that_is_not_served_are_told_in_one_line(client):
    long = "city " * 200
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="tokens: 1 to 127 fit the model"):
            ask(client, "llama/law", long, stream=stream)
        with pytest.raises(openai.BadRequestError, match="prompt of 0 tokens"):
            ask(client, "llama/law", "", stream=stream)
        for stop in (5, "", ["a", ""]):
            with pytest.raises(openai.BadRequestError, match="a text or a list of texts"):
                ask(client, "llama/law", stop=stop, stream=stream)
    assert ask(client, "llama", stop=[]).choices[0].text == ask(client, "llama").choices[0].text
    for name in ("llama/laws", "mistral", "llamas", "llama/"):
        with pytest.raises(openai.NotFoundError, match="served are llama, llama/law, llama/code"):
            ask(client, name)
    with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"):
        client.chat.completions.create(model="llama", messages=[{"role": "user", "content": "Hi"}])
    assert ask(client, "llama").choices[0].text  # and it is still there


def test_a_text_ends_where_the_context_does(client):
    prompt = "city " * 60
    got = client.completions.create(model="llama", prompt=prompt, max_tokens=500, temperature=0)
    assert got.usage.total_tokens <= 128


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pack", "law"], "--pack law: NAME=DIR is needed"),
        (["--pack", "law=/nowhere"], "/nowhere/config.json: No such file or directory"),
        (["--memory", "disk"], "memory='disk'"),
        (["--memory-budget", "1MB"], "this model has no memory, and no pack"),
        (["--threads", "0"], "threads=0: at least 1"),
        (["--batch", "0"], "--batch 0: at least 1"),
    ],
)
def test_what_cannot_be_served_is_one_line(directories, arguments, words, capsys):
    from engram_lm.cli import main

    if arguments[0] == "--memory":
        arguments = [*arguments, "--pack", f"law={directories / 'law'}"]
    assert main(["serve", str(directories / "base"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_continuous_batching_is_refused_with_its_reason(model):
    model.use_packs("law")
    try:
        with pytest.raises(engram_lm.ConfigError, match="cannot page its state"):
            model.init_continuous_batching()
    finally:
        model.use_packs()
