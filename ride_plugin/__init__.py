"""RIDE for any PyTorch codebase: see https://arxiv.org/abs/2010.01809 and the README."""

from ride_plugin._output import ExpertOutput, expert_logits
from ride_plugin._version import __version__

__all__ = ["ExpertOutput", "__version__", "expert_logits"]
