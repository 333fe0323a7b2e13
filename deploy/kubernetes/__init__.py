"""Baton on Kubernetes: the Helm chart in chart/, and a renderer of it for those without Helm."""
