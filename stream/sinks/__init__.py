"""Where messages and results go: one module per transport or file format."""
