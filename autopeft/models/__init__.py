"""The torch side: knows one model, attaches plans to it, prices, saves and exports them."""

from autopeft.utils.quiet import hushed

with hushed():
    # It imports the packages that quantize weights, where they are installed.
    import peft as peft
