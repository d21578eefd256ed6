"""Tokens: the process that owns the device, its model, batches and working KV. The only place that knows torch."""
