"""Images: how they split into tiles, how they are decoded, how pixels become tiles."""
