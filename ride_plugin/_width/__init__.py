"""How experts become narrower."""

from ride_plugin._width._narrow import narrow_expert

__all__ = [
    "narrow_expert",
]
