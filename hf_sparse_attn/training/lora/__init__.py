"""LoRA adapters: added, saved and loaded."""
