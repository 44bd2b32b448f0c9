"""Train the demo's byte-level BPE tokenizer and turn the collected text into token files.

``train`` writes ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``.
``encode`` writes ``train.bin`` / ``heldout_files.bin`` / ``heldout_packages.bin`` (little-endian
uint16, documents in a seeded random order, each one closed by ``<|endoftext|>``) and ``bytes.json``
(text bytes of every file, for bits per byte). Refuses text that yields an id above 65535.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from collect import HELD_OUT

VOCAB = 8192
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
EOS_ID, MASK_ID = 0, 3
# Qwen's splitting rule: one digit a token, a run of spaces keeps its last space for the next word.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts(path: Path, every: int = 1) -> Iterator[str]:
    with path.open() as lines:
        for i, line in enumerate(lines):
            if i % every == 0:
                yield json.loads(line)["text"]


def train(corpus: Path, out: Path) -> Tokenizer:
    """Learn the merges on every fifth training document and write the tokenizer's files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts(corpus / "train.jsonl", every=5), trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    write_configs(out)
    return tokenizer


def write_configs(out: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[EOS_ID],
        "mask_token": SPECIAL[MASK_ID],
        "pad_token": SPECIAL[EOS_ID],
        "unk_token": None,
        "model_max_length": 4096,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": EOS_ID, "pad_token_id": EOS_ID, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def encode(tokenizer: Tokenizer, documents: list[str], out: Path) -> dict[str, int]:
    ids: list[np.ndarray] = []
    for start in range(0, len(documents), 500):
        for item in tokenizer.encode_batch_fast(documents[start : start + 500]):
            ids.append(np.array([*item.ids, EOS_ID], dtype="<u2"))
    flat = np.concatenate(ids)
    flat.tofile(out)
    return {"tokens": len(flat), "bytes": sum(len(text.encode()) for text in documents)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by collect.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.tokenizer / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    else:
        tokenizer = train(args.corpus, args.tokenizer)
    documents = list(texts(args.corpus / "train.jsonl"))
    random.Random(0).shuffle(documents)
    sizes = {"train": encode(tokenizer, documents, args.out / "train.bin")}
    held = [json.loads(line) for line in (args.corpus / "heldout.jsonl").open()]
    for name, whole in (("heldout_files", False), ("heldout_packages", True)):
        chosen = [row["text"] for row in held if (row["source"] in HELD_OUT) is whole]
        sizes[name] = encode(tokenizer, chosen, args.out / f"{name}.bin")
    (args.out / "bytes.json").write_text(json.dumps(sizes, indent=1) + "\n")
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
