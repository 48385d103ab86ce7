"""Compute nodes from on-demand and preemptable queues. Never imports `stream`: a pilot just runs a command."""
