"""Bundles: a profile, its adapter and gates in one folder."""
