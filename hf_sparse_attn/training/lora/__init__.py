"""LoRA adapters: added to a model, saved and loaded.

May import what training/ may, and no other part of it but files.
"""
