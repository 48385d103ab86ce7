"""The page that the scientist keeps open: results as they come, drawn in a browser.

A process of its own (`stream.live.server`), so that neither fits nor browsers take time from the correlator: it hears
results as any other subscriber does (`stream.sinks.zmq`), makes a `Section` of each once, and gives every browser the
newest of those that it does not have.
"""
