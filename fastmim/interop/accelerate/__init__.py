"""How other people's modules are made fast in place: one file per family, and what they share."""
