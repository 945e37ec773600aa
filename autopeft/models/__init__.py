"""The torch side: knows one model, attaches plans to it, prices, saves and exports them."""

from autopeft.utils.quiet import QUANTIZERS, quiet_loggers

with quiet_loggers(*QUANTIZERS):
    # It imports the packages that quantize weights, where they are installed.
    import peft as peft
