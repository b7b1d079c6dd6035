"""Adapter experts on pretrained networks: long-tailed text and images, the trunk computed once."""
