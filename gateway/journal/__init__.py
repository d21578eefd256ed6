"""What was said, in a database: the only thing the gateway must never lose."""
