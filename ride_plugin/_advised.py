"""What messages of the library say on the command line: its options, and what needs a script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ride_plugin._errors import ArgumentError, RIDEError

_OF_BACKBONES = {  # what the library's errors call them, and what the command line does
    "num_experts": "--num-experts",
    "expert_width": "--expert-width",
    "expert_widths": "--expert-width",
    "max_flops_ratio": "--budget",
    "fork_at": "--fork-at",
    "example_input": "--input",
    "logits": "--logits",
    "num_classes": "--num-classes",
}
_OPTIONS = {
    "plan": _OF_BACKBONES,
    "inspect": _OF_BACKBONES,
    "report": {"many": "--many", "few": "--few"},  # whose `logits` are an array of the file
}
_PLACES = "--logits takes an index or a name; a function goes into a script, to RIDEWrapper."
_IN_PYTHON = "What is written in Python here goes into a script, as an argument of RIDEWrapper."
_QUOTE = "'"
_SIMPLE = r"-?\d+(\.\d+)?|'[^']+'"  # a value that an option takes
# One that has no option, or a value that none takes.
_ARGUMENT = r"`(logits|classifier|init|expert_factory|return_experts)=|RIDEWrapper\.from_"
GIVEN = (
    "--input gives the sizes of one sample and makes random floating-point numbers of them. Leave "
    "it out for a network that takes others, such as token ids, whose input is guessed."
)
GUESSED = (
    "Here --input can only be the sizes of one sample of floating-point numbers, such as "
    "3,224,224. A network that takes something else is wrapped in a script, with `example_input=`."
)


def with_options(message: str, command: str) -> str:
    """The message with the command line's options in the place of arguments of the library.

    An option takes an index, a number or a name; another value is left in Python.
    """
    options = _OPTIONS[command]

    def option(found: re.Match[str]) -> str:
        asked, name, value = found.groups()
        entry = name == "logits" and not (asked or "=" in found[0])  # of what a network returns
        if name not in options or entry or (value and not re.fullmatch(_SIMPLE, value)):
            return found[0]
        said = options[name] if not value else f"`{options[name]} {value.strip(_QUOTE)}`"
        return f"{asked or ''}{said}"

    said = re.sub(r"(argument )?`(\w+)(?:=([^`]*))?`", option, message)
    if "--logits" in said:
        said += f" ({_PLACES})"
    if re.search(_ARGUMENT, said):
        said += f" ({_IN_PYTHON})"
    return said


@contextmanager
def naming(argument: str, array: str) -> Iterator[None]:
    """Let errors in a block say the file's name of an array for the library's of an argument."""
    try:
        yield
    except RIDEError as error:
        raise ArgumentError(str(error).replace(f"`{argument}`", f"`{array}`")) from error
