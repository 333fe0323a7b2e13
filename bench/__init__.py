"""Load, comparison and the yardsticks beside them. Starts processes and speaks HTTP; knows nothing of their insides."""
