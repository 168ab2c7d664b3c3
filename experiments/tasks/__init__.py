"""The tasks of the settings: language, text to text, and reviews."""
