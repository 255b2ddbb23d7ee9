"""What a call costs, sparse and dense, and whether sparse pays.

May import levels 0 to 3 of .github/ARCHITECTURE.md; measuring a machine belongs to bench/, deciding a call to
decision.py.
"""
