"""Where frames come from: one module per transport or file format."""
