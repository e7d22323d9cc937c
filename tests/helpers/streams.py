"""Texts as evaluation reads them, a language model that is known exactly, and the memory that a call takes."""

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltaproduct.models import ModelConfig, SequenceModel


class Stream:
    """A corpus's split, from a list of documents (token ids, the document token first)."""

    def __init__(self, documents):
        self.ids = torch.tensor([token for document in documents for token in document])
        self.document_offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        self.num_tokens, self.num_documents = len(self.ids), len(documents)

    def tokens(self, start, stop):
        assert 0 <= start < stop <= self.num_tokens
        return self.ids[start:stop].clone()


def random_stream(documents, length, vocab_size, seed=0):
    """Documents of equal length, each of which begins with token 0; no other token is 0."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab_size, (documents, length), generator=g)
    ids[:, 0] = 0
    return Stream(ids.tolist())


def bigram_model(log_p):
    """A `SequenceModel` in float64 that predicts from the last token alone: its logits are the rows of log_p [V,V]."""
    vocab = len(log_p)
    config = ModelConfig.build(
        vocab_size=vocab, num_labels=vocab, hidden_size=vocab, num_heads=1, head_dim=4, intermediate_size=0
    )
    model = SequenceModel(config).double().eval()
    with torch.no_grad():
        model.embedding.weight.copy_(1e4 * torch.eye(vocab))  # so that the norm's eps, 1e-5, does not show
        model.blocks[0].mixer.o_proj.weight.zero_()
        model.head.weight.copy_(log_p.T / vocab**0.5)
    return model


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` becomes the most bytes that results of PyTorch's operators held at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result
