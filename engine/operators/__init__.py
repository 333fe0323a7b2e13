"""What a decoder layer computes between its products and its attention."""
