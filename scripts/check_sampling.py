"""Do sampled tokens depend on the budget or the tree? Counts differing tokens on the demo pair.

    python scripts/check_sampling.py [--tokens 10000]

Every sampler below continues held-out prompts of the demo pair by plain decoding, and again at
budgets 2, 6, 12 and auto with every kind of tree in turn; all texts must be the same, token by
token. Prints a row per sampler, and exits 1 where a token differs. swor is left out: it follows the
same distribution, not the same draws (tests/specdec/test_lossless.py).
"""

import argparse
import sys
from itertools import count
from typing import Literal

from specdec.demo_pair import PROMPTS
from specdec.generation import Request, generate
from specdec.load import Loaded, Settings, load
from specdec.prompts import read_prompts
from specdec.sampling import Sampling
from specdec.tree.build import KINDS
from specdec.units import table

BUDGETS: tuple[int | Literal["auto"], ...] = (2, 6, 12, "auto")
TEXT = 125  # tokens of a continuation
SAMPLINGS = (
    Sampling(),
    Sampling(repetition_penalty=1.2),
    Sampling(temperature=0.3, seed=1),
    Sampling(temperature=0.8, seed=2),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=1.5, seed=4),
    Sampling(temperature=0.8, top_p=0.95, seed=5),
    Sampling(temperature=0.8, top_k=40, seed=6),
    Sampling(temperature=1.0, min_p=0.05, seed=7),
    Sampling(temperature=0.7, top_p=0.9, top_k=50, min_p=0.02, repetition_penalty=1.1, seed=8),
)


def differing(loaded: Loaded, sampling: Sampling, prompts: list[tuple[int, ...]]) -> list[int]:
    """Tokens of plain decoding, then per budget the tokens that are others."""
    tokens, wrong, kinds = 0, dict.fromkeys(BUDGETS, 0), count()
    for prompt in prompts:
        request = Request(prompt, budget=1, max_tokens=TEXT, sampling=sampling)
        plain = generate(loaded.engine, loaded.tokenizer, request).tokens
        tokens += len(plain)
        for budget in BUDGETS:
            request = Request(
                prompt,
                budget=budget,
                tree=KINDS[next(kinds) % len(KINDS)],
                max_tokens=TEXT,
                sampling=sampling,
            )
            found = generate(loaded.engine, loaded.tokenizer, request).tokens
            assert len(found) == len(plain)
            wrong[budget] += sum(a != b for a, b in zip(plain, found, strict=True))
    return [tokens, *wrong.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000, help="of plain decoding, in all")
    texts = -(-parser.parse_args().tokens // (len(SAMPLINGS) * TEXT))
    loaded = load(Settings(context=1024, budget=max(b for b in BUDGETS if isinstance(b, int))))
    encode = loaded.tokenizer.encode
    prompts = [tuple(encode(one.text))[-64:] for one in read_prompts(PROMPTS)][:texts]
    rows: list[tuple[str, ...]] = [("sampler", "tokens", *(f"budget {b}" for b in BUDGETS))]
    total = [0] * (1 + len(BUDGETS))
    for sampling in SAMPLINGS:
        found = differing(loaded, sampling, prompts)
        total = [a + b for a, b in zip(total, found, strict=True)]
        rows.append((str(sampling), *map(str, found)))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    rows.append(("all", *map(str, total)))
    print(f"differing tokens, against plain decoding\n{table(rows)}")
    sys.exit(1 if any(total[1:]) else 0)


if __name__ == "__main__":
    main()
