"""Folders of weights too large to load: read, converted and written a part at a time."""
