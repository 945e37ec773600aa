"""What the servers of adapters load: a table of rules, and a check of folders."""
