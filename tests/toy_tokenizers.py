"""Small tokenizers of the kinds that checkpoints have, with merges of common words."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ("the", "cat", "user", "is", "hello", "in")
BASE_ADDED = ("<s>", "</s>", "<pad>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
_SPLIT = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")


def _pieces(alphabet: list[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(alphabet))}
    merges = list[tuple[str, str]]()
    for word in (*WORDS, *(space + word for word in WORDS)):
        whole = word[0]
        for letter in word[1:]:
            if whole + letter not in vocabulary:
                vocabulary[whole + letter] = len(vocabulary)
                merges.append((whole, letter))
            whole += letter
    return vocabulary, merges


def _byte_level(pre: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(*_pieces(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt2() -> Tokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def gpt2_prefixed() -> Tokenizer:
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(_SPLIT, "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(pre_tokenizers.Sequence([split, byte_level]))


def qwen() -> Tokenizer:
    tokenizer = llama3()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    alphabet += sorted({letter for word in WORDS for letter in word}) + list("<>|_.")
    model = models.BPE(
        *_pieces(alphabet, "▁"), byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def llama2() -> Tokenizer:
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    return tokenizer


def llama2_legacy() -> Tokenizer:
    tokenizer = _sentencepiece()
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    make.__name__: make for make in (gpt2, gpt2_prefixed, llama3, qwen, llama2, llama2_legacy)
}


def write(kind: str, path: Path) -> Path:
    """Writes the files of a checkpoint's tokenizer, which puts <s> before a text."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(list(BASE_ADDED))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken(" <r>", rstrip=True)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path)
    return path
