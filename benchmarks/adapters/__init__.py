"""Adapter experts on a pretrained sentence encoder: long-tailed CLINC150, trunk computed once."""
