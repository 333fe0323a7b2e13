"""Goodput: the highest rate at which nearly all requests are answered fast enough to be worth it."""
