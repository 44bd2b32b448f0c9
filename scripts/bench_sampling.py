"""Microseconds to choose a token from one row of logits, by vocabulary, shape and sampler.

    python scripts/bench_sampling.py

"peaked" has twenty likely tokens over a wide tail, as language models do; "flat" is the worst case,
where the nucleus is most of the vocabulary. The rows of a round that are off the path cost nothing.
Medians.
"""

from time import perf_counter

import numpy as np

from specdec.processors import distribution
from specdec.sampling import Sampling
from specdec.uniforms import TARGET, uniforms
from specdec.units import table

VOCABULARIES = (8192, 151_936, 248_320)
SAMPLINGS = (
    Sampling(temperature=0.8),
    Sampling(temperature=0.8, top_p=0.95),
    Sampling(temperature=0.8, top_k=50),
    Sampling(temperature=0.8, min_p=0.05),
    Sampling(temperature=0.8, repetition_penalty=1.1),
    Sampling(temperature=0.8, top_p=0.95, top_k=50, min_p=0.05, repetition_penalty=1.1),
)
REPEATS = 50


def rows(vocab: int) -> dict[str, np.ndarray]:
    """Logits float32 [vocab] by shape."""
    random = np.random.default_rng(0)
    peaked = random.normal(0, 2.5, vocab)
    peaked[random.integers(0, vocab, 20)] += 12
    flat = random.normal(0, 1, vocab)
    return {"peaked": peaked.astype(np.float32), "flat": flat.astype(np.float32)}


def microseconds(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> float:
    """Median time of one token."""
    seconds = []
    for position in range(REPEATS):
        start = perf_counter()
        uniform = float(uniforms(sampling.seed, position, 1, TARGET)[0])
        distribution(logits, sampling, seen).draw(uniform)
        seconds.append(perf_counter() - start)
    return float(np.median(seconds)) * 1e6


def main() -> None:
    head = ["sampler", *(f"{vocab} {shape}" for vocab in VOCABULARIES for shape in rows(256))]
    lines = [tuple(head)]
    for sampling in SAMPLINGS:
        line = [str(sampling)]
        for vocab in VOCABULARIES:
            seen = np.random.default_rng(1).integers(0, vocab, 2000)
            line += [f"{microseconds(row, sampling, seen):.0f}" for row in rows(vocab).values()]
        lines.append(tuple(line))
    print(f"microseconds per row, median of {REPEATS}\n{table(lines)}")


if __name__ == "__main__":
    main()
