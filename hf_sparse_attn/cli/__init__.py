"""The command line: arguments, and what the commands print.

May import everything; work that a program could want belongs to the room that a command calls.
"""

from hf_sparse_attn.cli.commands import main as main
