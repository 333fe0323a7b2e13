"""The transfer engines. `open_backend` is the only place that knows their names."""
