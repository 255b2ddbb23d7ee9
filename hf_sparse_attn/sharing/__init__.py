"""What files share: written whole, strict JSON, the Hub, model cards, fingerprints and gates.

May import levels 0 to 2 of .github/ARCHITECTURE.md, fingerprint and gates 0 to 6; the format of one kind of file
belongs to its own room.
"""
