"""How the attention of a host library is reached, eager and compiled, and put back.

May import levels 0 to 5 of .github/ARCHITECTURE.md; what holds for one model family alone belongs to patches/.
"""
