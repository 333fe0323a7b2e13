"""Where a cluster's processes run: each launcher knows one kind of place."""
