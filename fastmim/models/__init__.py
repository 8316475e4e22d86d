"""Models over nn and ops; each reads like its paper."""
