"""Files, tables and plots that report a search."""
