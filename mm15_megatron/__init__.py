"""mm15_megatron: a Megatron-style trainer for the MM1 / MM1.5 family of multimodal LLMs."""

__version__ = "0.1.0"
