"""Readers of data that belong to one library each, imported when met."""
