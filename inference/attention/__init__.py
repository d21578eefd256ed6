"""Attention of new tokens over working KV, one backend per kind of device."""
