"""Bytes: the storage daemon that keeps the KV of finished turns in shared memory and on SSD.

Two processes. The front (service.py) answers inference and gateway from one event loop and owns every slot, lease and
index entry. The SSD worker (ssd/worker.py) is the only one to open RocksDB and
the chunk files, and moves chunks between them and the arena.
"""
