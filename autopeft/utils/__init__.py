"""Small tools that any room may use; they know nothing of adapters."""
