"""Photographs, and JPEGs made from them."""
