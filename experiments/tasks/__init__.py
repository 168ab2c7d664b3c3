"""What the settings train on: language, text to text, and reviews."""
