"""Work from folder to folder: inspections and conversions, a part of a model in memory at a time."""
