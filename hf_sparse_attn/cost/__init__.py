"""What a call costs, sparse and dense, and whether sparse pays."""
