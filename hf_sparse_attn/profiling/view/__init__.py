"""Profiles as tables, plots and HTML pages."""
