"""Writes the quickstart's data: real text and tasks out of Python packages, without a download of its own."""
