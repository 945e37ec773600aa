"""Where adapters may pay, told from a few rows and without training."""
