"""The proof that a configuration computes the same thing in every layout, as a tool (``tools/check_parity.py``)."""
