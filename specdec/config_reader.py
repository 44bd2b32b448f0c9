"""ConfigReader: typed keys of a config.json, with errors that name the file, the key and the value.

A leaf: imports no room.
"""

from collections.abc import Mapping
from math import inf
from typing import Any

from specdec.errors import CheckpointError


class ConfigReader:
    """Looks a key up in several objects in turn; null counts as absent."""

    def __init__(self, source: str, *places: Mapping[str, Any]) -> None:
        """source: the file, for errors."""
        self.source, self.places = source, places

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {text}")

    def get(self, key: str) -> Any:
        found = (place[key] for place in self.places if place.get(key) is not None)
        return next(found, None)

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"missing key {key!r}")
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(f"{key} = {value!r}, expected an integer of at least {minimum}")
        return value

    def positive(self, key: str, default: float, zero: bool = False) -> float:
        """A finite number above 0, or 0 as well with `zero`."""
        value = self.get(key)
        if value is None:
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not (0 < value < inf or (zero and value == 0)):
            raise self.error(f"{key} = {value!r}, expected a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key} = {value!r}, expected true or false")
        return value

    def attention_heads(self, hidden: int) -> tuple[int, int, int]:
        """Query heads, key-value heads and features of a head."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.error(f"{heads} attention heads do not divide among {kv_heads} kv heads")
        return heads, kv_heads, self.integer("head_dim", hidden // heads)
