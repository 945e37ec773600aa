"""Other people's trainers and trackers: what connects them to a search."""
