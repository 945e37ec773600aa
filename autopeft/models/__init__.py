"""One model: load it, find its sites, attach plans to it, save, merge and export them."""

from autopeft.utils.quiet import QUANTIZERS, quiet_loggers

with quiet_loggers(*QUANTIZERS):
    # peft imports the installed packages that quantize weights.
    import peft as peft
