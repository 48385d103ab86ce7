"""What is computed from frames as they come."""
