"""One short file per verb: which data, which objective, which initial weights."""
