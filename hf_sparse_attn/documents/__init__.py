"""The pages of .github/docs, made from the registries, the docstrings and the files of measured figures.

May import everything but the command line; measures nothing, and holds no prose that a docstring could hold.
"""
