"""Quality at equal density, of the shipped models and of any other.

May import levels 0 to 11 of .github/ARCHITECTURE.md; choosing a method for each head belongs to profiling/, times of
kernels to bench/.
"""
