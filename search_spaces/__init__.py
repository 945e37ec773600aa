"""The search spaces that come with autopeft: YAML files, read by `autopeft.search.source`."""
