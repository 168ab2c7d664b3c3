"""Work from folder to folder: inspections and conversions that load a part of a model at a time."""
