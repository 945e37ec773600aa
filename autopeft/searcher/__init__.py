"""Decides what to try: spaces, samplers, pruners, the study, the verdict. Never trains."""
