"""What the gateway costs: latency over talking to inference directly, open streams, memory per conversation."""
