"""The journal's schema, step by step; `journal.py` brings a database to the newest step when it opens it."""
