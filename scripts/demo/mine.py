"""Prompts in bulk from collected files: what the target is to continue for the draft's training.

Functions, classes and methods, cut after the signature, after the docstring or a few lines on;
docstrings as running text; file beginnings; random places of a file. Writes a token file in which
every prompt is closed by ``<|endoftext|>`` (little-endian uint16, random order). Reads the files
of training, or with ``--held-out`` the held-out files outside the held-out packages.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from collect import HELD_OUT
from tokenise import EOS_ID

PROSE = (18, 60)  # words


def definitions(tree: ast.Module, lines: list[str], rng: random.Random) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first = node.body[0]
        cuts = {first.lineno - 1}
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            cuts = {first.end_lineno or first.lineno}
        if rng.random() < 0.4:
            cuts.add(max(cuts) + rng.randint(1, 6))
        for cut in cuts:
            if cut >= node.lineno and cut < len(lines):
                yield "\n".join(lines[node.lineno - 1 : cut]) + "\n"


def prose(tree: ast.Module, rng: random.Random) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            words = (ast.get_docstring(node) or "").split()
            if len(words) > PROSE[0] + 8:
                count = rng.randint(PROSE[0], min(PROSE[1], len(words) - 4))
                yield '"""' + " ".join(words[:count])


def places(text: str, count: int, rng: random.Random) -> Iterator[str]:
    """From the file's beginning and from random line beginnings, cut anywhere."""
    starts = [i + 1 for i, c in enumerate(text[:-400]) if c == "\n"]
    for start in [0, *rng.sample(starts, min(count, len(starts)))]:
        yield text[start : start + rng.randint(90, 420)].rsplit(" ", 1)[0]


def mine(line: str) -> list[str]:
    record = json.loads(line)
    text = record["text"]
    rng = random.Random(record["path"])
    found = list(places(text, 1 + len(text) // 2000, rng))
    if record["path"].endswith(".py"):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return found
        found += definitions(tree, text.split("\n"), rng)
        found += prose(tree, rng)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by collect.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--low", type=int, default=24, help="tokens of the shortest prompt")
    parser.add_argument("--high", type=int, default=112, help="tokens of the longest prompt")
    parser.add_argument("--count", type=int, default=600_000, help="prompts to keep at most")
    parser.add_argument("--out", type=Path, required=True, help="the .bin to write")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    with (args.corpus / ("heldout.jsonl" if args.held_out else "train.jsonl")).open() as lines:
        wanted = (x for x in lines if json.loads(x)["source"] not in HELD_OUT)
        with Pool(2) as pool:
            found = {text for part in pool.imap(mine, wanted, 64) for text in part}
    texts = sorted(text for text in found if len(text) < 8 * args.high)
    random.Random(11).shuffle(texts)
    out: list[np.ndarray] = []
    kept = 0
    for i in range(0, len(texts), 4096):
        for piece in tokenizer.encode_batch_fast(texts[i : i + 4096]):
            fits = args.low <= len(piece.ids) <= args.high and EOS_ID not in piece.ids
            if fits and kept < args.count:
                out.append(np.array([*piece.ids, EOS_ID], dtype="<u2"))
                kept += 1
        if kept == args.count:
            break
    np.concatenate(out).tofile(args.out)
    print(f"{len(texts):,} texts, {kept:,} prompts, {sum(map(len, out)):,} tokens")


if __name__ == "__main__":
    main()
