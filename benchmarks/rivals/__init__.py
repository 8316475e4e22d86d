"""The models that fastmim is measured against, and how they are compared."""
