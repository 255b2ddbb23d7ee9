"""Head profiles: a method for every head, as a value, a file and a page.

May import levels 0 to 7 of .github/ARCHITECTURE.md; measuring and choosing belong to profiling/.
"""
