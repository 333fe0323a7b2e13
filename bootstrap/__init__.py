"""Membership and handshake: which workers are there, with which epoch, layout and capabilities."""
