"""NaN that a text meets on its way: an error, and no end of the text."""

from typing import Any

import mlx.core as mx
import pytest

from specdec.engine import Engine
from specdec.errors import NonFiniteError
from specdec.generation import Request, generate
from specdec.sampling import GREEDY, Sampling
from specdec.tokenizer import Tokenizer
from tests.backends import each_backend
from tests.cheating import CheatingDraft
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.targets import opened, rewrite

PROMPT = tuple(range(40, 60))


@each_backend
@pytest.mark.parametrize("budget", [1, 6])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, seed=1)], ids=str)
def test_nan_amid_a_text_is_an_error_and_no_end(budget, sampling, backend, tmp_path):
    """The sixth token's embedding is broken: the run stops where that token would be read."""
    folder = write_checkpoint(tmp_path, "qwen3_moe", quantize=None)
    tokenizer = Tokenizer.open(write_tokenizer(folder))
    with opened(folder, backend) as target:
        intact = generate(
            Engine(target), tokenizer, Request(PROMPT, 1, max_tokens=40, sampling=sampling)
        )
    broken = intact.tokens[5]
    assert broken not in PROMPT + intact.tokens[:5]

    def plant(tensors):
        name = "model.embed_tokens.weight"
        rows = mx.arange(320)[:, None] == broken
        tensors[name] = mx.where(rows, mx.array(mx.nan, mx.bfloat16), tensors[name])

    rewrite(folder, plant)
    with opened(folder, backend, pins=1, slots=4) as target:
        draft: Any = CheatingDraft(intact.tokens, len(PROMPT), 320)
        engine = Engine(target, draft)
        pieces: list[str] = []
        request = Request(PROMPT, budget, max_tokens=30, sampling=sampling)
        with pytest.raises(NonFiniteError, match="token embeddings"):
            generate(engine, tokenizer, request, lambda piece: pieces.append(piece.text))
        assert intact.text.startswith("".join(pieces))
        shorter = Request(PROMPT, 1, max_tokens=5, sampling=sampling)
        assert generate(engine, tokenizer, shorter).tokens == intact.tokens[:5]
