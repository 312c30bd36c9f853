"""The tokenizer of a tiny checkpoint: byte-fallback BPE in Gemma's form, with the family's special tokens.

The file is of Gemma's own kind: spaces become "▁", nothing splits the text before BPE, unknown characters
fall back to bytes. So every reader gets the same ids, also one that rebuilds the tokenizer from vocabulary
and merges alone, as transformers does for Gemma. Training, however, splits the text into words, runs of white
space with operators, and single digits and brackets. No merge crosses from one of these into another, so
that, with no splitting later, `[7:0]` or a name is the same tokens wherever it stands. A small model then
learns to copy a name instead of learning each of its spellings.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tpu.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Published ids (0-4, 98, 105, 106); the others take free places below 107, where Gemma has fillers too.
SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|image>": 80,
    "<image|>": 81,
    "<|image|>": 82,
    "<|audio>": 83,
    "<audio|>": 84,
    "<|audio|>": 85,
    "<|video|>": 86,
    "<|tool>": 90,
    "<tool|>": 91,
    "<|tool_call>": 92,
    "<tool_call|>": 93,
    "<|tool_response>": 94,
    "<tool_response|>": 95,
    '<|"|>': 96,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
FIRST_BYTE = 107
NAMED = {  # the names by which readers of tokenizer_config.json find them
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "escape_token": '<|"|>',
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
}


@dataclass(frozen=True)
class Words:
    """A family's special tokens: their ids, and the names by which readers of tokenizer_config.json find them."""

    special: Mapping[str, int]
    named: Mapping[str, str]


GEMMA4_WORDS = Words(SPECIAL, NAMED)
GEMMA3_WORDS = Words(
    {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "<start_of_image>": 80,
        "<end_of_image>": 81,
        "<image_soft_token>": 82,
        "<start_of_turn>": 105,
        "<end_of_turn>": 106,
    },
    {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
)

# Every printable ASCII character is a token whatever the texts hold; all else is spelled in bytes.
ALPHABET = ["\t", "\n", *(chr(code) for code in range(33, 127)), "▁"]
# Words; white space with the operators and separators that stand in it; every other character by itself.
RUNS = r"[A-Za-z_]+|[▁\n,;=&|^<>+*/%@?-]+|."
# The words of the chat template, which the texts may lack, often enough to become tokens.
TURN_WORDS = ["system user model thought"] * 1000
SMALLEST_VOCAB = FIRST_BYTE + 256 + len(ALPHABET)


def write_tokenizer(folder: Path, texts: Iterable[str], vocab: int, words: Words = GEMMA4_WORDS) -> None:
    """Trains on `texts`, writes tokenizer.json and tokenizer_config.json; same texts, same bytes."""
    if vocab < SMALLEST_VOCAB:
        raise UserError(
            f"vocab is {vocab}: a tokenizer needs at least {SMALLEST_VOCAB} ({FIRST_BYTE} special tokens, "
            f"256 bytes, {len(ALPHABET)} characters); give a larger vocab, or tokenizer=False"
        )
    ids, merges = _vocabulary(texts, vocab, words)
    (folder / "tokenizer.json").write_text(_assemble(ids, merges, words).to_str(pretty=True), encoding="utf-8")
    config = json.dumps(_config(words), indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


def _vocabulary(texts: Iterable[str], vocab: int, words: Words) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Special tokens and fillers, bytes, characters, merges, and fillers again where the texts run out."""
    names = {i: text for text, i in words.special.items()}
    tokens = [names.get(i, f"<unused{i}>") for i in range(FIRST_BYTE)]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    merges = _train_merges(texts, vocab - len(tokens))
    tokens += [*ALPHABET, *("".join(pair) for pair in merges)]
    tokens += [f"<unused{i}>" for i in range(len(tokens), vocab)]
    return {text: i for i, text in enumerate(tokens)}, merges


def _train_merges(texts: Iterable[str], size: int) -> list[tuple[str, str]]:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(RUNS), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=ALPHABET, limit_alphabet=len(ALPHABET), show_progress=False
    )
    trained.train_from_iterator(chain(texts, TURN_WORDS), trainer)
    return [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]


def _assemble(ids: dict[str, int], merges: list[tuple[str, str]], words: Words) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in words.special])
    return tokenizer


def _config(words: Words) -> dict[str, Any]:
    return {
        "backend": "tokenizers",
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000_000_000_019_884_624_838_656,
        "extra_special_tokens": list(words.named.values()),
        **words.named,
        "model_specific_special_tokens": words.named,
    }
