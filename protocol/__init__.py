"""What the processes say to each other: ids, errors, messages, the ZeroMQ transport and the arena's layout.

The ground floor: everything here may be imported by every service, and nothing here imports one.
"""

PROTOCOL_VERSION = 3
