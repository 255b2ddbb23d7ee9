"""Quality at equal density, on real and shipped models."""
