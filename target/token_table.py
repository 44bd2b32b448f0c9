"""TokenTable: the experts that each token was routed to when it was last committed.

Learnt from the run's own committed rows, of tokens that were seen last; the oldest token makes way
when the memory is full.
"""

from collections import OrderedDict

import numpy as np

TABLE_BYTES = 16 << 20
ENTRY_BYTES = 192  # of a token, to find its place (measured: 150 to 175)


def table_tokens(vocab: int, layers: int, top_k: int) -> int:
    """How many tokens a table holds: the vocabulary, or what fits in TABLE_BYTES."""
    return max(1, min(vocab, TABLE_BYTES // _token_bytes(layers, top_k)))


def table_bytes(vocab: int, layers: int, top_k: int) -> int:
    """Memory of a table for a model with so many MoE layers."""
    return table_tokens(vocab, layers, top_k) * _token_bytes(layers, top_k)


def _token_bytes(layers: int, top_k: int) -> int:
    return layers * top_k * 2 + ENTRY_BYTES


class TokenTable:
    """token -> uint16 [layers, top_k], by falling logit."""

    def __init__(self, tokens: int, layers: int, top_k: int) -> None:
        """tokens: how many fit."""
        assert tokens >= 1
        self._experts = np.zeros((tokens, layers, top_k), np.uint16)
        self._places: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def learn(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        """tokens [rows], the latest last; experts [rows, layers, top_k]."""
        for token, chosen in zip(tokens.tolist(), experts, strict=True):
            place = self._places.pop(token, len(self._places))
            if place == len(self._experts):
                place = self._places.popitem(last=False)[1]
            self._experts[place] = chosen
            self._places[token] = place

    def find(self, tokens: np.ndarray) -> np.ndarray:
        """uint16 [known, layers, top_k] of those tokens that are known, in their order."""
        places = [self._places[one] for one in tokens.tolist() if one in self._places]
        return self._experts[places]
