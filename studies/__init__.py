"""The studies that ship with hintsearch, one YAML file each."""
