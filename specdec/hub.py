"""Where a model is: a folder on disk, or a Hugging Face repository fetched into the local cache.

A folder is taken as it is. "owner/name" is looked up in the local cache first and fetched only if
something is missing, and only the files the engine reads. Anything that looks like a path but is
not there is refused without a word to the network. Honours HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.
"""

import json
import os
import re
from pathlib import Path

from specdec.errors import CheckpointError

FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""Patterns of the files that are read from a repository, of a target or a draft."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(model: str) -> Path:
    """The folder of `model`, a path or "owner/name"; downloads the latter with a progress bar.

    Raises CheckpointError when there is no such folder or repository, or no way to reach it.
    """
    path = Path(os.path.expanduser(model))  # leaves an unknown user's ~name as it is
    # Of os.path: a path that may not be looked at, or cannot be, is no folder.
    if model and os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise CheckpointError(f"{model}: is a file; expected the folder that holds config.json")
    # "models/name" beside a folder "models" is a mistyped path, not somebody's repository.
    if not _REPOSITORY.fullmatch(model) or os.path.isdir(path.parent):
        raise CheckpointError(
            f"{model}: no such folder (and not a repository id of the form owner/name)"
        )
    return _fetch(model)


def _fetch(repository: str) -> Path:
    # Imported here: 0.2 s that a folder does not need.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        cached = huggingface_hub.snapshot_download(
            repository, allow_patterns=list(FILES), local_files_only=True
        )
        if _is_complete(Path(cached)):
            return Path(cached)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError):
        pass  # not in the cache, or not wholly: ask the hub, whose error is the one that counts
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=list(FILES), library_name="specdec"
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: this repository asks you to accept its terms first; do so on its page, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: no such repository on the Hugging Face hub, or a private one "
            "(log in with `hf auth login` or set HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: not in the local cache, and the Hugging Face hub cannot be reached "
            f"({_first_line(error)}); give a folder instead"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{repository}: download failed: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _is_complete(folder: Path) -> bool:
    """Whether a cached snapshot holds a config and every weight file it should.

    An interrupted download leaves a folder that looks like a snapshot.
    """
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / name).is_file() for name in names)
    return any(folder.glob("*.safetensors"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
