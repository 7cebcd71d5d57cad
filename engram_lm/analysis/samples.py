"""How a model goes on from a prompt."""

from typing import Any, TypedDict

import torch
from transformers import GenerationConfig

from engram_lm.evaluate.inference import inference
from engram_lm.model.modeling import EngramLMForCausalLM


class Sample(TypedDict):
    """A prompt and what was written behind it; ended: by a separator, not by the length limit."""

    prompt: str
    text: str
    ended: bool


def samples(
    model: EngramLMForCausalLM, tokenizer: Any, prompts: list[str], *, tokens: int
) -> list[Sample]:
    """The most likely next token, again and again, up to `tokens` of them or a separator.

    Greedy, so that two models differ by what they know and not by luck. All prompts run as one
    batch, each behind a separator.
    """
    separator = tokenizer.eos_token_id
    encoded = [
        [separator, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts
    ]
    width = max(len(ids) for ids in encoded)
    ids_BT = torch.tensor([[separator] * (width - len(ids)) + ids for ids in encoded])
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=separator,
        bos_token_id=separator,
        pad_token_id=separator,  # behind an end nothing else is read
    )
    writer: Any = model  # transformers' own annotation of generate refuses every model
    with inference(model):
        written_BT = writer.generate(
            ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=greedy,
        )
    rows = []
    for prompt, written_T in zip(prompts, written_BT[:, width:].tolist(), strict=True):
        ended = separator in written_T
        kept = written_T[: written_T.index(separator)] if ended else written_T
        text = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        rows.append(Sample(prompt=prompt, text=text, ended=ended))
    return rows
