"""`python -m hf_sparse_attn`."""

from hf_sparse_attn.cli import main

raise SystemExit(main())
