"""Profiles as tables, plots and HTML pages.

May import what profiling/ may, and profiling/ itself; nothing is measured or chosen here.
"""
