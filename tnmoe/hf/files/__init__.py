"""The files of a Hugging Face folder: which ones count, and their tensors, read and written."""
