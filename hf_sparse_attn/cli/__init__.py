"""The command line."""

from hf_sparse_attn.cli.commands import main as main
