"""What operators see: dashboards made from code, rules and scrape configurations for Prometheus.

`python -m deploy.observability` (`make dashboards`) writes the dashboards anew.
"""
