"""numba on arrays and ints; knows nothing of messages."""
