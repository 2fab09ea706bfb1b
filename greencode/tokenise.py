"""CodeXGLUE tokens -> text -> model tokens; packing for training; contexts for completion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from greencode.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, EOL = "<s>", "</s>", "<EOL>"

# One pre-token: an end of line, a word, a number, a run of punctuation, each with the blank before it,
# so that every CodeXGLUE token can become one model token and decoding gives the text back exactly.
_PRETOKEN = rf" ?{EOL}| ?[\p{{L}}_]+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}_]+|\s+"


def text_of(code: Sequence[str]) -> str:
    """The text a model reads: tokens joined by one blank, without `<s>` and `</s>` (as in the paper)."""
    return " ".join(code[1:-1])


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int, directory: str | Path) -> None:
    """Train a byte-level BPE of at most `vocabulary` entries and save it in Hugging Face layout."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(directory))


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory; a directory without one is a `UserError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"No usable tokenizer in {directory} ({reason}).") from None


def encode(
    tokenizer: PreTrainedTokenizerBase, codes: Iterable[Sequence[str]], batch: int = 512
) -> Iterator[list[int]]:
    """Model tokens of each file, with whatever the tokenizer puts before a text (`<s>`, `</s>`)."""
    texts: list[str] = []
    for code in codes:
        texts.append(text_of(code))
        if len(texts) == batch:
            yield from tokenizer(texts, verbose=False)["input_ids"]
            texts = []
    if texts:
        yield from tokenizer(texts, verbose=False)["input_ids"]


def pack(files: Iterable[Sequence[int]], block: int) -> np.ndarray:
    """Blocks [n, block] of int32 tokens: long files are split, short ones share a block (III-D).

    The tail that fills no block is left out; fewer tokens than one block are a `UserError`.
    """
    stream = np.concatenate([np.asarray(file, dtype=np.int32) for file in files] or [np.zeros(0, np.int32)])
    blocks = len(stream) // block
    if not blocks:
        raise UserError(
            f"Only {len(stream)} training tokens, fewer than one sequence of {block}: "
            "use more files or a shorter finetune.sequence_length."
        )
    return stream[: blocks * block].reshape(blocks, block)


@dataclass(frozen=True)
class Sample:
    """A file's first tokens and the ones to predict.

    Attributes:
        id: the file's id in its split.
        context: at least one token.
        reference: the file's own next tokens.
    """

    id: int
    context: list[int]
    reference: list[int]


def cut(
    file_id: int,
    tokens: Sequence[int],
    fraction: float,
    max_context: int,
    new_tokens: int,
    min_context: int = 20,
) -> Sample | None:
    """The completion task of section VI-C: the first `fraction` of the file, then `new_tokens`.

    None if the file is too short to have `min_context` tokens before and `new_tokens` after the cut.
    """
    length = min(int(len(tokens) * fraction), max_context)
    if length < min_context or length + new_tokens > len(tokens):
        return None
    return Sample(file_id, list(tokens[:length]), list(tokens[length : length + new_tokens]))
