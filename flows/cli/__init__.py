"""The command `rfdetr-pipeline`: argument parser, subcommands, `doctor`."""
