"""Answers from a model: every item of an evaluation task, or one question on the command line."""
