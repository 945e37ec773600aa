"""A plug-in of autopeft that predicts how many likes a post gets."""
