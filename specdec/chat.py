"""The chat template of a checkpoint, rendered in a sandbox.

Templates come with checkpoints, so they are other people's programs: they run in Jinja's immutable
sandbox, see only the messages and a few helpers, and one that reaches for anything else is refused
with a PromptError. Supports what published templates use (loop controls, `raise_exception`,
`tojson`, `strftime_now`, `generation` blocks); refuses tools and documents, which are not offered.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specdec.errors import CheckpointError, PromptError

Message = Mapping[str, str]


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training: render the body."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """One compiled template and the special tokens it may name (`bos_token` and the like)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        """Compile `source`; `origin` names the file in errors. Raises CheckpointError."""
        self.origin = origin
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{origin}: chat template does not parse at line {error.lineno}: {error.message}"
            ) from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text of `messages` ({"role", "content"} each), open for the answer.

        Raises PromptError if the template refuses the messages, fails, or leaves the sandbox.
        """
        values = {**self._special_tokens, "messages": [dict(message) for message in messages]}
        try:
            return self._template.render(**values, add_generation_prompt=True, tools=None)
        except SecurityError as error:
            raise PromptError(
                f"{self.origin}: chat template tried to leave its sandbox ({error}); "
                "use --raw to skip the template"
            ) from error
        except TemplateError as error:
            raise PromptError(f"{self.origin}: chat template failed: {error.message}") from error
        # A template may divide by zero, overflow, index out of range...: whatever it raises is
        # its own failure, and the user's way out is the same.
        except Exception as error:
            raise PromptError(
                f"{self.origin}: chat template failed: {type(error).__name__}: {error}; "
                "use --raw to skip the template"
            ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
