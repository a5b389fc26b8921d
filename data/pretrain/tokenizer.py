"""The tokenizer of a pretrained model, and the corpus as streams of its token ids."""

import itertools
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.arrays import IntArray
from data.text.corpus import SEGMENTS
from data.text.document import Document


def train_tokenizer(
    documents: list[Document], vocabulary: int, sentinels: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: pad is token 0, end 1, unknown 2; sentinels, if any, come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(sentinels),
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text[:4000] for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(sentinels),
        model_max_length=512,
    )


def token_streams(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> dict[str, IntArray]:
    """Concatenates the token ids of each segment; every document ends with the end-of-sequence token."""
    streams = {}
    for segment in SEGMENTS:
        texts = [document.text for document in documents if document.segment == segment]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        streams[segment] = np.fromiter(
            itertools.chain.from_iterable([*row, tokenizer.eos_token_id] for row in ids), dtype=np.int64
        )
    return streams
