"""Indexed datasets on disk: format, writer, reader."""
