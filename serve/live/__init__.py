"""What is served now: Bundles, canaries, changes of the catalogue."""
