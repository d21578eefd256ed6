"""Metrics, logging and status of every process. The only place that knows prometheus_client."""
