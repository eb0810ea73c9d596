"""The tokenizer: byte-level BPE, its special tokens, and texts as one stream of ids.

Knows nothing of windows or of the model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
SPACE, NEWLINE = "\u0120", "\u010a"  # how byte-level BPE spells these two bytes in its vocabulary

# Runs of newlines, of two or more spaces (indentation) and of other blanks stay whole; a single space goes with the
# word, the digit or the punctuation that follows it.
PIECES = r"\n+| {2,}|[^\S\n ]+| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+| "

Ids = npt.NDArray[np.int64]


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Train the byte-level BPE tokenizer; encoding puts BOS first, decoding gives back the very same text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in (BOS, EOS, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """Encode the texts as one stream: BOS, file, EOS, BOS, file, EOS and so on."""
    encodings = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*encoding.ids, EOS_ID], dtype=np.int64) for encoding in encodings])
