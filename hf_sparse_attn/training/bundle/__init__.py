"""Bundles: an adapter, sparse settings, a profile or gates, and the figures, in one folder.

May import training/lora and what training/ may; how they were trained does not belong here.
"""
