"""One module per question: `python -m bench NAME`."""
