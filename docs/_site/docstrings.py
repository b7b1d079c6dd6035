"""Shows the package's docstrings on the reference pages."""

import re
from typing import Any

import griffe

_FACES = ("", ".losses", ".routing", ".longtail", ".functional")  # later ones are not preferred
_SECTION = re.compile(r"^[A-Z]\w+:$", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Shows an ``Example:`` section as code, and `Name` as a link to what it names.

    Of a constructor only the sections are shown: they stand below its class, which says more.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite every docstring of the package before it is parsed."""
        links: dict[str, str] = {}
        for face in _FACES:
            module = pkg[face[1:]] if face else pkg
            for name in module.exports or ():
                if name in module.members and not name.startswith("_"):
                    links.setdefault(str(name), f"{module.path}.{name}")
        for name in ("functional", "routing", "longtail", "losses", "Form"):
            links.pop(name, None)
        _rewrite(pkg, links)


def _rewrite(parent: griffe.Object, links: dict[str, str]) -> None:
    if parent.docstring is not None:
        text = parent.docstring.value
        if parent.name == "__init__":
            text = text[match.start() :] if (match := _SECTION.search(text)) else ""
        parent.docstring.value = _shown(text, links)
    for member in parent.members.values():
        if not member.is_alias:
            _rewrite(member, links)


def _shown(text: str, links: dict[str, str]) -> str:
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)

    def link(match: re.Match[str]) -> str:
        name = match.group(1)
        path = links.get(name.split(".")[-1])
        return f"[`{name}`][{path}]" if path else f"`{name}`"

    return re.sub(r"(?<!`)(?::\w+:)?`~?(\w[\w.]*)`(?!`)", link, text)
