"""Attention over the paged KV cache: the interface (`base`) and its implementations."""
