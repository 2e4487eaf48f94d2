"""Imported by the scripts at the top and by tools/; nothing here is run."""
