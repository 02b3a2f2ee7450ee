"""Readers of the files that users have: each turns one published format into records, piece by piece."""
