"""Moving KV pages between pools: who may write where, when, and how both sides know that it ended."""
