"""Choose the held-out prompts that ship with the demo pair.

Code: beginnings of Python functions, classes and modules of the held-out packages, cut after the
docstring or the signature, 40 to 160 tokens. Prose: beginnings of held-out docstrings and
documents. Writes one ``{"id", "class", "prompt"}`` a line.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from collect import HELD_OUT

CODE, PROSE = 24, 10


def definitions(source: str) -> Iterator[str]:
    """Module-level functions and classes, cut after the docstring."""
    lines = source.split("\n")
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or len(node.body) < 3:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            yield "\n".join(lines[node.lineno - 1 : first.end_lineno]) + "\n"


def module_head(source: str) -> str:
    """A module's docstring, imports and the lines up to the first blank line after them."""
    cut = [m.start() for m in re.finditer(r"\n\n\n", source)]
    return source[: cut[0] + 2] if cut else ""


def docstrings(source: str) -> Iterator[str]:
    """The first sentences of long docstrings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node) or ""
            words = text.split()
            if len(words) > 60 and ">>>" not in text and "::" not in text:
                yield '"""' + " ".join(words[:45])


def choose(items: list[str], count: int, tokenizer: Tokenizer, low: int, high: int) -> list[str]:
    fitting = [t for t in dict.fromkeys(items) if low <= len(tokenizer.encode(t).ids) <= high]
    return random.Random(3).sample(sorted(fitting), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by collect.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    code: list[str] = []
    heads: list[str] = []
    prose: list[str] = []
    for line in (args.corpus / "heldout.jsonl").open():
        record = json.loads(line)
        if record["source"] not in HELD_OUT:
            continue
        if record["path"].endswith(".py"):
            try:
                code += definitions(record["text"])
                prose += docstrings(record["text"])
            except SyntaxError:
                continue
            heads.append(module_head(record["text"]))
    picked = [("code", t) for t in choose(code, CODE - 6, tokenizer, 40, 160)]
    picked += [("code", t) for t in choose(heads, 6, tokenizer, 40, 160)]
    picked += [("prose", t) for t in choose(prose, PROSE, tokenizer, 30, 120)]
    with args.out.open("w") as out:
        for i, (kind, prompt) in enumerate(picked):
            out.write(json.dumps({"id": f"{kind}-{i:02d}", "class": kind, "prompt": prompt}) + "\n")


if __name__ == "__main__":
    main()
