"""Us against every peer of the frameworks installed, side by side in one run."""
