"""The torch side: knows one model, attaches plans to it, prices, saves and exports them."""

from autopeft.models.hush import hushed

with hushed():
    # It imports the packages that quantise weights, where they are installed.
    import peft as peft
