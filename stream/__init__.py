"""Live X-ray photon correlation spectroscopy from detector streams."""
