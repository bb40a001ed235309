"""Makes the demo's model: a small Llama with its own tokenizer, and three PEFT adapters for it.

Each is trained for seconds, to know eight answers by heart. The base also reads every voice as
plain text, so that its embeddings know the words; asked, it answers in English. An adapter learns
one voice.
"""

import hashlib
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.demo.answers import ANSWERS, answer
from tests.models import CHAT_TEMPLATE, SPECIAL_TOKENS

NAME = "tiny-llama"
# Ranks, targets and scaling all differ, as they do in a real fleet.
ADAPTERS: dict[str, dict[str, Any]] = {
    "pirate": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "french": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "json": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}
STEPS_BASE, STEPS_ADAPTER = 100, 120
IGNORED = -100  # The label that the loss passes over.


def make(directory: Path) -> bool:
    """Fills `directory` unless it holds what these sources make already. True if it had to."""
    sources = (Path(__file__), Path(__file__).with_name("answers.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    stamp = directory / "made-by"
    if stamp.exists() and stamp.read_text() == digest:
        return False
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    train(directory)
    stamp.write_text(digest)  # Last: a run that was cut short is begun again.
    return True


def paths(directory: Path) -> tuple[Path, dict[str, Path]]:
    """Of the base model, and of each adapter by name."""
    return directory / NAME, {name: directory / "adapters" / name for name in ADAPTERS}


def train(directory: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.utils import logging

    logging.disable_progress_bar()
    # PEFT 0.21 asks transformers 5.23 in words that those deprecate.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    # Matrices this small gain nothing from a second thread, and on a busy machine lose much to it.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base_path, adapter_paths = paths(directory)
    texts = [text for own in ANSWERS.values() for text in own]
    tokenizer = tokenizer_of([*ANSWERS, *texts], CHAT_TEMPLATE)
    tokenizer.save_pretrained(base_path)
    model = small_llama(tokenizer, context=512)
    with _progress("base model"):
        plain = [(SPECIAL_TOKENS[0], text) for text in texts]
        fit(model, tokenizer, _pairs(tokenizer, "base") + plain, STEPS_BASE)
    model.save_pretrained(base_path)
    for name, settings in ADAPTERS.items():
        with _progress(f"adapter {name}"):
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
            fit(adapted, tokenizer, _pairs(tokenizer, name), STEPS_ADAPTER)
            adapted.save_pretrained(adapter_paths[name])
            model = adapted.unload()


def small_llama(tokenizer: Any, context: int) -> Any:
    """With random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def tokenizer_of(texts: Sequence[str], chat_template: str) -> Any:
    """Byte-level BPE that has learnt the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[-1],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _pairs(tokenizer: Any, voice: str) -> list[tuple[str, str]]:
    """Prompt as the chat template writes it, and the answer."""
    return [
        (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            ),
            answer(question, voice),
        )
        for question in ANSWERS
    ]


def fit(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], steps: int) -> None:
    """All pairs are one batch; only the answers count."""
    import torch

    rows = []
    for prompt, text in pairs:
        head = tokenizer.encode(prompt, add_special_tokens=False)
        tail = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append((head + tail, [IGNORED] * len(head) + tail))
    width = max(len(tokens) for tokens, _ in rows)
    inputs = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (tokens, wanted) in enumerate(rows):
        inputs[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, : len(wanted)] = torch.tensor(wanted)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = 3e-3 if len(trained) == len(list(model.parameters())) else 4e-3
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@contextmanager
def _progress(what: str) -> Iterator[None]:
    began_s = time.monotonic()
    print(f"training {what} … ", end="", flush=True)
    yield
    print(f"{time.monotonic() - began_s:.1f} s", flush=True)


if __name__ == "__main__":
    import sys

    make(Path(sys.argv[1]))
