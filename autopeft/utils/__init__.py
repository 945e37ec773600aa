"""Small helpers for all packages; they do not depend on adapters."""
