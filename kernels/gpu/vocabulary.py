"""Vocabulary: the words of kernel bodies that a platform does not have by itself.

metal.h and cuda.h beside this file hold one definition per line. A kernel gets the lines it uses
and no others: a text is compiled for each of its variants, and on Metal joined at each call.
"""

import re

DEFINED = re.compile(r"(?:#define|using)\s+(\w+)|(\w+)\(")


def definitions(vocabulary: str, text: str) -> str:
    """The lines of `vocabulary` that `text` needs, in their order, and what these need in turn.

    A line defines the name after `#define` or `using`, or else the first name that is called.
    """
    lines = [line for line in vocabulary.splitlines() if line and not line.startswith("//")]
    names = [_name(line) for line in lines]
    words = set(re.findall(r"\w+", text))
    needed: set[int] = set()
    while more := {i for i, name in enumerate(names) if name in words} - needed:
        needed |= more
        words |= {word for i in more for word in re.findall(r"\w+", lines[i])}
    return "".join(lines[i] + "\n" for i in sorted(needed))


def without_comments(text: str) -> str:
    """The text without // comments, indentation and empty lines."""
    lines = (line.split("//")[0].strip() for line in text.splitlines())
    return "".join(line + "\n" for line in lines if line)


def _name(line: str) -> str:
    found = DEFINED.search(line)
    assert found is not None, f"defines nothing: {line}"
    return found[1] or found[2]
