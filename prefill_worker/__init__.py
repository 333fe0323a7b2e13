"""A worker of the prefill pool: queue, chunked prefill, hand over, release."""
