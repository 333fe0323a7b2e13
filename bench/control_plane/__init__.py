"""How bootstrap and a router bear many workers: real processes and sockets, workers that compute nothing."""
