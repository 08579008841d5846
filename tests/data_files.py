"""Token files for the tests."""

import numpy as np

from metastate.data.indexed import paths, token_dtype, write_index


def write_dataset(prefix, documents, vocab_size):
    """Write documents of token ids to PREFIX.bin and PREFIX.idx."""
    dtype = token_dtype(vocab_size)
    content = b"".join(np.asarray(document).astype(dtype).tobytes() for document in documents)
    paths(prefix)[0].write_bytes(content)
    write_index(prefix, [len(document) for document in documents], dtype)
