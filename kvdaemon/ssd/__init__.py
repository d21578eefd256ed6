"""The SSD tier: a worker process around RocksDB, and the front's link to it."""
