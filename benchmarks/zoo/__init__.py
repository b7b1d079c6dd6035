"""Backbones written by hand, each hard to split in a way of its own."""
