"""Files of tokenizers for the tests."""

import pytest


def unigram(unknown="<unk>", prefix=True) -> bytes:
    """A vocabulary of words in which </s> is one, as T5's is."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "</s>", "\u2581", "\u2581a", "\u2581b", *"ab</s>"]
    scores = [(word, -float(len(words) - len(word))) for word in dict.fromkeys(words)]
    model = tokenizers.models.Unigram(scores, unk_id=words.index(unknown))
    tokenizer = tokenizers.Tokenizer(model)
    if prefix:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
    else:
        replace = tokenizers.normalizers.Replace(" ", "\u2581")
        steps = [tokenizers.normalizers.Prepend("\u2581"), replace]
        tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    return tokenizer.to_str().encode()
