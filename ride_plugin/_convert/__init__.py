"""Other forms of a model: the authors' checkpoints, read without running anything in them."""

from ride_plugin._convert._official import OfficialCheckpoint, load_official_checkpoint

__all__ = ["OfficialCheckpoint", "load_official_checkpoint"]
