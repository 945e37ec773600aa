"""The adapter methods: one file a family, torch-free; what each can do and what it costs."""
