"""Data: indexed datasets, tokenisation, images, packing, the order of rows, and the loader."""
