"""Scores of generated captions and answers, and the controls they are read against. Imports no torch."""
