"""The stages of a flight: see README.md here."""
