"""The embedded model's tokenizer: byte-level BPE, digits one by one. No torch here: batch workers start fast."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from inference.embedded.template import SPECIAL_TOKENS

VOCABULARY = 2048
# A word takes its space along, except before a capital letter, a digit or punctuation that begins something: names
# and numbers are the same tokens at the beginning of a message and within it, so that they can be found again.
_PIECES = r"'[a-z]+| ?\p{Ll}+|\p{Lu}\p{L}*|[^\S\n]+(?=[a-z])|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens, special ones included. Equal texts give equal tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`."""
    return Tokenizer.from_file(str(path))
