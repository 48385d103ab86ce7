"""Compute nodes from on-demand queues. Never imports `stream`: a pilot just runs a command."""
