"""Row formats: what users' files look like, and what each becomes (Dialogue, Pair, Rated). See table.py."""
