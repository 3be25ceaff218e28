"""From numbers to decisions: layer metrics, hint selection, pairing, comparing trials."""
