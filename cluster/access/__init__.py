"""Who may speak to whom: keys in files, proof of the cluster's secret, TLS."""
