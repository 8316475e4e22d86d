"""Models, built from fastmim.nn and fastmim.ops."""
