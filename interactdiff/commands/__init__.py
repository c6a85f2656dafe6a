"""The commands of the command line, one a module: `add_to` adds its parser, which names what to run."""
