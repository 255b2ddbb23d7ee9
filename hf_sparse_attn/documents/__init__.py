"""The pages of .github/docs, made from the registries, the docstrings and the files of measured figures.

May import everything but the command line; measuring does not belong here, nor prose that a docstring could hold.
"""
