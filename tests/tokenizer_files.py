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


def tiny_json() -> bytes:
    """A byte-level BPE trained on one sentence, with <|endoftext|>."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the state is the weight matrix, the state is read"], trainer)
    return bpe.to_str().encode()
