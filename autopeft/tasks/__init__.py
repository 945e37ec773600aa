"""Kinds of problems: how rows are read, encoded, scored and summed up."""
